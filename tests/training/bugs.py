"""Bugs planted into training: name -> (function, text that occurs once in it, what stands there instead, quantity of a
run that shows it)."""

_STEPPER, _RUN = "llmmed.training.step:Stepper", "llmmed.training.loop:_Run"

BUGS = {
    "sum over micro-batches": (f"{_STEPPER}.run", "self.scale / count", "self.scale", "grad_norm"),
    "gradients of the step before kept": (f"{_STEPPER}.run", "first=index == 0", "first=False", "first moments"),
    "gradients of the last micro-batch alone": (f"{_STEPPER}.run", "first=index == 0", "first=True", "first moments"),
    "rate one step late": (f"{_STEPPER}.run", "learning_rate(step,", "learning_rate(max(0, step - 1),", "matrices"),
    "clipping left out": (f"{_STEPPER}._update", "self._config.train.grad_clip > 0", "False", "first moments"),
    "moments lost on resuming": (
        f"{_STEPPER}.restore",
        "self._owners[parameter].state[parameter][key].copy_(tensor)",
        "pass",
        "first moments",
    ),
    "norms decayed": (
        "llmmed.optim.adamw:decay_groups",
        '"weight_decay": 0.0',
        '"weight_decay": weight_decay',
        "norms",
    ),
    "one micro-batch left out on resuming": (
        f"{_RUN}._windows_of",
        "self._tokens(step) // self.config.train.seq_len",
        "self._tokens(step) // self.config.train.seq_len + self.config.train.micro_batch_size * (self.first > 0)",
        "first moments",
    ),
    "sum of losses logged": (
        f"{_RUN}._keep_track",
        "_mean_of_finite(torch.stack(self.losses))",
        "sum(self.losses)",
        "loss",
    ),
    "rate logged one step late": (f"{_RUN}._log", "learning_rate(step,", "learning_rate(step - 1,", "lr"),
}

SCALING_BUGS = {  # in fp16
    "loss scale left in the gradients": (
        f"{_STEPPER}._update",
        "divisor = self.scale\n",
        "divisor = torch.ones_like(self.scale)\n",
        "first moments",
    ),
    "loss scale left in the norm": (f"{_STEPPER}._update", "is not None]) / self.scale", "is not None])", "grad_norm"),
    "loss scale left in the loss": (f"{_STEPPER}.run", "total /= self.scale", "pass", "loss"),
}
