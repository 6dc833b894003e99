"""What a person reads for the numbers of a line of metrics.jsonl."""

from collections.abc import Mapping

LABELS: Mapping[str, str] = {
    "loss": "loss",
    "diffusion_loss": "diffusion loss",
    "crepa_loss": "crepa_loss",
    "crepa_alignment_score": "alignment",
    "crepa_similarity_self": "self-similarity",
    "crepa_weight": "weight",
    "learning_rate": "lr",
    "grad_norm": "grad norm",
}
