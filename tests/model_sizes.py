"""How many tokens of video or image a transformer class gets where its pipeline's call is left at its defaults."""

import inspect

import diffusers

# Pipeline, frames a latent frame, pixels a token's side; the sizes are the defaults of its call.
_OF_PIPELINES = {
    "HunyuanVideo": ("HunyuanVideoPipeline", 4, 16),
    "Wan": ("WanPipeline", 4, 16),
    "WanVACE": ("WanVACEPipeline", 4, 16),
    "SkyReelsV2": ("SkyReelsV2Pipeline", 4, 16),
    "ChronoEdit": ("ChronoEditPipeline", 4, 16),
    "AnyFlow": ("AnyFlowPipeline", 4, 16),
    "LTXVideo": ("LTXPipeline", 8, 32),
    "Kandinsky5": ("Kandinsky5T2VPipeline", 4, 16),
    "Kandinsky6": ("Kandinsky6TI2VAPipeline", 4, 16),
    "Cosmos": ("Cosmos2_5_PredictBasePipeline", 4, 16),
    "MotifVideo": ("MotifVideoPipeline", 4, 16),
    "EasyAnimate": ("EasyAnimatePipeline", 4, 16),
    "ErnieImage": ("ErnieImagePipeline", 1, 16),
    "Krea2": ("Krea2Pipeline", 1, 16),
    "Ideogram4": ("Ideogram4Pipeline", 1, 16),
}
# Where the call itself sets them: frames, height and width, and how they become tokens.
_SET_INSIDE = {
    "CogVideoX": ((81, 768, 1360), 8, 16),  # of CogVideoX 1.5, whose latent frames are paired
    "LTX2Video": ((121, 512, 768), 8, 32),
    "Cosmos3Omni": ((189, 720, 1280), 4, 32),
    "Mochi": ((19, 480, 848), 6, 16),
    **dict.fromkeys(
        ("Flux", "Flux2", "QwenImage", "LongCatImage", "OvisImage", "SD3", "ZImage"), ((1, 1024, 1024), 1, 16)
    ),
}
_H3 = "37,296 (1344 x 768, 124 frames)"  # whose 17 frames are five latent ones


def tokens_of(kind: str) -> str:
    """For a table: the tokens and what they are of; empty where the pipeline has no size of its own."""
    model = kind.partition("Transformer")[0]
    if model in _SET_INSIDE:
        (frames, height, width), every, side = _SET_INSIDE[model]
    elif model in _OF_PIPELINES:
        pipeline, every, side = _OF_PIPELINES[model]
        call = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
        height, width = call["height"].default, call["width"].default
        frames = call["num_frames"].default if "num_frames" in call else 1
    else:
        return _H3 if model == "MiniMaxH3" else ""
    count = -(-frames // every) * -(-height // side) * -(-width // side)
    of = f"{width} x {height}" + (f", {frames} frames" if frames > 1 else "")
    return f"{count:,} ({of})"
