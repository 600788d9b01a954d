"""The model card of a saved lens: what it reads, how to use it, and its measured numbers."""

from __future__ import annotations

import json

from conlens_jax.evaluation.report.markup import format_number
from conlens_jax.inspection.parts import LensParts

_METRICS = {
    "fve_nrm": "directional variance explained, greedy text",
    "kl_frac_mean": "share of the damage of a mean swap that the text repairs, greedy text",
    "kl_at": "KL(M ‖ M with the reconstruction) at the token, nats",
    "cos": "cosine of activation and reconstruction",
    "top1_agree": "M's most probable token stays the same",
    "sampled_fve_nrm": "directional variance explained, sampled text",
    "sampled_kl_frac_mean": "share of the damage repaired, sampled text",
    "null_shuffle_fve_nrm": "control: the text of another row",
    "null_shuffle_kl_frac_mean": "control: the text of another row",
    "claims": "statements of an explanation that can be checked",
    "claims_right": "share of them that is right",
    "support_ece": "calibration error of their support, the probability that they are right",
    "support_right_at_90": "share that is right of those with a support of at least 0.9",
    "support_share_at_90": "share of the claims with a support of at least 0.9",
}


def model_card(lens: LensParts, includes_model: bool) -> str:
    """Markdown with the hub's front matter."""
    model_id, facts = lens.model.model_id, lens.facts
    front = {"library_name": "conlens_jax", "tags": ["consistency-lens", "interpretability"]}
    if not includes_model:
        front["base_model"] = model_id
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items()]
    where = "It is in the folder `model/`." if includes_model else "It is loaded by its name."
    most = "" if lens.spec.end is None else "at most "
    described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
    return "\n".join(
        [
            *("---", *lines, "---", ""),
            f"# Consistency lens for {model_id}, layer {lens.spec.layer}",
            "",
            f"Reads the output of block {lens.spec.layer} (0-based) of {model_id} as a text of "
            f"{most}{lens.spec.text_len} tokens, and turns the text back into an activation. "
            f"{where}",
            "",
            f"Checkpoint: {described}.",
            "",
            "```python",
            "import conlens_jax",
            "",
            'lens = conlens_jax.Lens.load("this folder or hub id")',
            'print(lens.explain("some text").to_json())',
            "```",
            "",
            "## Measured",
            "",
            *_table(lens),
            "",
            "A text is what the decoder was trained to write. Good predictions from its "
            "reconstruction show that it carries information, not that each of its words is true. "
            + (
                "How often a claim is right was not measured for this lens."
                if lens.calibration is None
                else "Each claim has a support (`reading.words`), on text like this lens's own."
            ),
            "",
        ]
    )


def _table(lens: LensParts) -> list[str]:
    metrics = lens.metrics
    shown = [name for name in _METRICS if isinstance(metrics.get(name), int | float)]
    if not shown:
        return ["Not evaluated yet (`python -m conlens_jax.evaluate`)."]
    rows = ["| metric | value | 95 % interval | meaning |", "|---|---|---|---|"]
    for name in shown:
        ends = [metrics.get(f"{name}_{end}") for end in ("lo", "hi")]
        interval = "" if None in ends else " to ".join(map(format_number, ends))
        value = format_number(metrics[name])
        rows.append(f"| `{name}` | {value} | {interval} | {_METRICS[name]} |")
    return [*rows, "", "On held-out documents, by `python -m conlens_jax.evaluate`."]
