"""llmmed trains language models and picks, for every operation, the kernel that is proved right and measured fastest.

Nothing heavy is imported here: `import llmmed` costs milliseconds, so that a configuration error is told at once.
"""

__version__ = "0.1.0"
