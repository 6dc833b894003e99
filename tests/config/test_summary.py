"""A plan in words."""

from crepatrain.config.plan import Plan
from crepatrain.config.summary import summarize


def summary(plan: Plan) -> dict[str, str]:
    return dict(summarize(plan))


def test_the_summary_says_what_will_happen(plan, wan, clips):
    rows = summary(plan())
    assert str(wan) in rows["model"]
    assert "Wan 2.1" in rows["model"]
    assert str(clips) in rows["clips"]
    assert "9 frames of 64 x 96 at 16 fps" in rows["clips"]
    assert "3 x 4 x 6 = 72" in rows["tokens"]
    assert "3 optimizer steps" in rows["steps"]
    assert rows["task"] == "text-to-video"
    assert "LoRA rank 4, scaled by alpha 4 / rank, on to_q, to_k, to_v, to_out.0" in rows["trained"]
    assert "0.001" in rows["optimizer"]
    assert rows["precision"].startswith("fp32;")


def test_the_summary_tells_what_is_trained_of_what_for_what(plan, tiny):
    rows = summary(plan(**tiny("wan", "tiny-i2v-a14b"), wan_expert="low", i2v_dropout=0.25, lora_use_rslora=True))
    assert "Wan 2.2 image-to-video, the low-noise expert (noise levels 0 to 0.875)" in rows["model"]
    assert rows["task"] == "image-to-video from each clip's first frame, 25% of the samples without it"
    assert "alpha 4 / sqrt(rank)" in rows["trained"]
    rows = summary(plan(**tiny("ltxvideo"), task="i2v", model_type="full", mixed_precision="bf16"))
    assert "LTX-Video" in rows["model"]
    assert rows["task"] == "image-to-video from each clip's first frame"
    assert rows["trained"] == "every weight of the transformer"
    assert rows["precision"].startswith("bf16 arithmetic, fp32 weights")
    assert "every Linear of the blocks" in summary(plan(lora_targets="all-linear"))["trained"]
    assert r"every layer that blocks\..*to_q matches" in summary(plan(lora_targets=r"blocks\..*to_q"))["trained"]


def test_the_summary_tells_what_is_in_host_memory(plan):
    assert "host memory" not in summary(plan())
    rows = summary(plan(checkpoint_offload=True, nested_checkpointing=True))
    assert rows["host memory"] == "the blocks' inputs from forward to backward"
    assert "gradient checkpointing on, and in each part of a block" in rows["precision"]
    rows = summary(plan(checkpoint_offload=True, block_offload=3))
    assert rows["host memory"].startswith("the frozen weights of 3 of ")
    rows = summary(plan(checkpoint_offload=True, memory="auto"))
    assert rows["host memory"] == "the blocks' inputs from forward to backward"
    assert "block_offload" in rows["memory"]


def test_the_summary_tells_block_and_teacher(plan, wan):
    words = summary(plan())["CREPA"]
    assert "block 8 of 0 to 9" in words
    assert f"{wan / 'encoder'} at 56x84" in words
    assert "4 x 6 patches" in words
    assert "patch on patch" in words
    words = summary(plan(crepa_block_index=2, crepa_feature_source="backbone", crepa_teacher_block_index=7))["CREPA"]
    assert "block 2 of 0 to 9 learns from block 7 of the same transformer" in words
    words = summary(plan(crepa_encoder_image_size=518))["CREPA"]
    assert "518x518" in words
    assert "37 x 37" in words
    assert "the teacher's grid resampled onto the student's" in words
    assert "frame means" in summary(plan(crepa_spatial_align=False))["CREPA"]
    assert "off" in summary(plan(crepa_enabled=False))["CREPA"]


def test_the_summary_tells_the_neighbours(plan):
    assert "two frames 1 away" in summary(plan())["neighbours"]
    assert "exp(-distance / 2)" in summary(plan(crepa_adjacent_tau=2))["neighbours"]
    assert "frames 1 to 2 away" in summary(plan(crepa_adjacent_distance=2, crepa_cumulative_neighbors=True))["neighbours"]
    assert "two frames 1 away" in summary(plan(crepa_cumulative_neighbors=True))["neighbours"]
    assert summary(plan(crepa_adjacent_distance=0))["neighbours"].startswith("none")


def test_the_summary_tells_the_schedule(plan):
    assert summary(plan())["weight"] == "0.5"
    schedule = {"crepa_scheduler": "cosine", "crepa_warmup_steps": 100, "crepa_lambda_end": 0.1}
    assert summary(plan(**schedule))["weight"] == "0 to 0.5 in 100 steps, then cosine to 0.1 by the end of the run"
    assert "in 5000 steps (step 5100)" in summary(plan(**schedule, crepa_decay_steps=5000))["weight"]
    assert "polynomial of power 2" in summary(plan(crepa_scheduler="polynomial", crepa_power=2))["weight"]


def test_the_summary_tells_that_the_loss_grows_with_the_clip(plan):
    words = summary(plan(crepa_normalize_by_frames=False))["weight"]
    assert words == "0.5, on the sum over the token frames (3 at this size), which grows with a clip's length"


def test_the_summary_tells_the_cutoff_beside_the_reachable_maximum(plan):
    assert summary(plan())["cutoff"] == "none (the score's maximum here is 1.491)"
    assert "off from step 2000" in summary(plan(crepa_cutoff_step=2000))["cutoff"]
    words = summary(plan(crepa_similarity_threshold=0.85))["cutoff"]
    for word in ("permanent", "alignment", "0.85", "mean cosine of about 0.57", "1.491"):
        assert word in words
    words = summary(plan(crepa_similarity_threshold=0.85, crepa_threshold_metric="self", crepa_threshold_mode="recoverable"))
    for word in ("recoverable", "self-similarity", "0.85", "1.000"):
        assert word in words["cutoff"]


def test_at_the_reference_size_a_threshold_of_0_85_is_a_cosine_of_about_a_half(plan):
    repo = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    size = {"height": 480, "width": 832, "num_frames": 81}
    words = summary(plan(pretrained_model_name_or_path=repo, crepa_similarity_threshold=0.85, **size))["cutoff"]
    assert "mean cosine of about 0.50" in words
    assert "1.701" in words


def test_the_summary_tells_layersync(plan):
    rows = summary(plan(layersync_enabled=True, layersync_student_block=2, layersync_teacher_block=7))
    assert rows["LayerSync"] == "block 2 follows block 7, weight 0.2"
    assert "LayerSync" not in summary(plan())
