"""English definitions of diseases, anatomy, cells and phenotypes, from the package `cellxgene-ontology-guide`.

MONDO (diseases), UBERON (anatomy), CL (cells), PATO (qualities) and the disease and phenotype part of EFO; one document
a term: "Label. Definition. Also called a, b or c. Broader terms: d, e."
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import json
import re
from collections import Counter
from typing import Any

from llmmed.errors import UserError

_PACKAGE = "cellxgene_ontology_guide"
_ONTOLOGIES = ("MONDO", "UBERON", "CL", "PATO", "EFO")
_EFO_ROOTS = ("EFO:0000408", "EFO:0000651", "MONDO:0000001", "HP:0000118")  # disease, phenotype
_BRACKETS = re.compile(r"\s*\[[^\[\]]*\]|\s*\{[^{}]*\}")  # references
_NOT_PROSE = re.compile(r"https?://|obsolete|non-human|\bOBSOLETE\b", re.IGNORECASE)
_NON_HUMAN = re.compile(
    r"non-human|\b(canine|feline|bovine|equine|porcine|ovine|murine|avian|dog|cat|horse|cattle|sheep|goat|pig|chicken|"
    r"rabbit|fish) (disease|disorder)|, (dog|cat|horse|cattle|sheep|goat|pig|chicken|rabbit|domestic \w+|\w+ duck)$",
    re.IGNORECASE,
)
_TEMPLATE_LIMIT = 20
_MOST_SYNONYMS, _MOST_ANCESTORS = 4, 3


def missing_package() -> str | None:
    """What is not installed, or None."""
    for module in (_PACKAGE, "zstandard"):
        if importlib.util.find_spec(module) is None:
            return module
    return None


def version() -> str:
    return importlib.metadata.version("cellxgene-ontology-guide")


def documents() -> list[str]:
    """All documents, in the ontologies' order, without duplicates. Raises `UserError` if the package is not there."""
    if missing := missing_package():
        raise UserError(f"data=biomed needs the package {missing}; pip install 'llmmed[biomed]', or use data=text")
    terms: list[tuple[str, str, str]] = []  # label, definition, the rest
    for name in _ONTOLOGIES:
        terms += _terms(name, _read(name))
    repeated = Counter(_template(definition) for _, definition, _ in terms)
    found: dict[str, str] = {}
    for label, definition, rest in terms:
        if repeated[_template(definition)] <= _TEMPLATE_LIMIT:
            found.setdefault(label.casefold(), f"{_sentence(label)} {definition}{rest}")
    return list(dict.fromkeys(found.values()))


def _read(name: str) -> dict[str, Any]:
    import zstandard

    folder = importlib.resources.files(_PACKAGE) / "data"
    versions = json.loads((folder / "latest_ontology_info.json").read_text(encoding="utf-8"))["ontologies"]
    packed = (folder / f"{name}-ontology-{versions[name]['version']}.json.zst").read_bytes()
    with zstandard.ZstdDecompressor().stream_reader(packed) as stream:
        terms: dict[str, Any] = json.loads(stream.read())
    return terms


def _terms(ontology: str, terms: dict[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    for term in terms.values():
        label, description = term.get("label"), term.get("description")
        if not label or not description or term.get("deprecated"):
            continue
        if ontology == "EFO" and not any(root in term["ancestors"] for root in _EFO_ROOTS):
            continue
        definition = _sentence(" ".join(_BRACKETS.sub("", description).split()))
        if len(definition) < 20 or _NOT_PROSE.search(definition) or _NON_HUMAN.search(f"{label} {definition[:60]}"):
            continue
        found.append((label.strip(), definition, _names(label, term) + _ancestors(term, terms)))
    return found


def _names(label: str, term: dict[str, Any]) -> str:
    others = [s for s in term.get("synonyms", []) if s.casefold() != label.casefold() and len(s) > 2][:_MOST_SYNONYMS]
    if not others:
        return ""
    listed = others[0] if len(others) == 1 else f"{', '.join(others[:-1])} or {others[-1]}"
    return f" Also called {listed}."


def _ancestors(term: dict[str, Any], terms: dict[str, Any]) -> str:
    nearest = sorted(term["ancestors"].items(), key=lambda item: item[1])
    labels = [terms[key]["label"] for key, distance in nearest if distance <= 2 and terms.get(key, {}).get("label")]
    return f" Broader terms: {', '.join(labels[:_MOST_ANCESTORS])}." if labels else ""


def _sentence(text: str) -> str:
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _template(definition: str) -> str:
    """The definition with all but its commonest words taken out: generated definitions look alike in it."""
    return " ".join(word if word.islower() and len(word) < 5 else "*" for word in definition.split())[:60] + str(
        len(definition.split())
    )
