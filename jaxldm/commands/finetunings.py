"""What `jaxldm info` says of the run of a fine-tuning: its method, and what of the model moves."""

from __future__ import annotations

from typing import Any


def method_of(own: Any) -> str:
    """The method of a `FinetuneRecipe`, as `--method` takes it; controlnet has a command of its own."""
    if own.control is not None:
        return "controlnet"
    if own.word is not None:
        return "textual-inversion"
    if own.prompt is not None:
        return "dreambooth"
    if own.lora is not None:
        return "lora"
    return "freeze" if own.freeze else "full"


def finetune_rows(own: Any) -> list[tuple[str, str]]:
    """(name, value) of what a fine-tuning trains, and from which model; none of other runs."""
    if own is None:
        return []
    rows = [("method", method_of(own)), ("from", own.source)]
    if own.lora is not None:
        alpha = own.lora.rank if own.lora.alpha is None else own.lora.alpha
        targets = own.lora.targets or ("all projections of attention",)
        rows += [("rank", f"{own.lora.rank}, alpha {alpha:g}"), ("targets", ", ".join(targets))]
    if own.word is not None:
        word = own.word
        rows += [
            ("word", f"{word.word}, at first like {word.initial}"),
            ("vectors", f"{word.vectors}, learned in texts of the kind {word.templates}"),
        ]
    if own.control is not None:
        sees = {"folder": "the condition pictures of the folder", "edges": "edges of the pictures"}
        rows.append(("control", sees[own.control.images]))
    if own.freeze:
        rows.append(("frozen", ", ".join(own.freeze)))
    if own.prompt is not None:
        rows.append(("prompt", own.prompt))
    if own.prior is not None:
        rows.append(("class", f"{own.prior.prompt}, with weight {own.prior.weight:g}"))
    return rows
