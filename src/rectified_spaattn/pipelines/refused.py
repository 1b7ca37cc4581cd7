"""Transformer classes of diffusers that have no row in the table of adapters, and why: together the two hold all."""

_OWN_CALL = "its processor calls its attention itself, and at its own size, 1024 x 1024, an image is 4,096 tokens"
_OWN_CALL_2K = "its processor calls its attention itself, and nobody made a stand-in"
_TEXT_KEYS = "its text gives keys and no queries, so that a call has other queries than keys"
_PAIRS = "its text mask is one of pairs of tokens, not of keys"
_SOUND = "it makes sound: a few thousand tokens"

REFUSED: dict[str, str] = {
    # video
    "AnyFlowFARTransformer3DModel": "it attends causally over chunks of frames, through a key-value cache",
    "HeliosTransformer3DModel": "it makes chunks of frames that attend to a compressed history in its own way",
    "LatteTransformer3DModel": "it attends within a frame and along time in turn, a thousand tokens at most",
    "SanaVideoTransformer3DModel": "its self-attention is linear in the number of tokens",
    "SanaWMTransformer3DModel": "three of its four layers attend linearly, and the last by itself",
    "SanaWMLTX2RefinerTransformer3DModel": "it attends through a key-value cache, chunk by chunk",
    "WanAnimate2Transformer3DModel": "it attends through a key-value cache, frame block by frame block",
    "TransformerTemporalModel": "it attends along time alone, over a few frames",
    # images
    "AuraFlowTransformer2DModel": _OWN_CALL,
    "BriaFibo2Transformer2DModel": "it changes the order of text and image with the length of the text",
    "ChromaTransformer2DModel": _PAIRS,
    "CogView3PlusTransformer2DModel": _OWN_CALL_2K,
    "CogView4Transformer2DModel": _OWN_CALL_2K,
    "DiTTransformer2DModel": "its images are 1,024 tokens at most",
    "DreamLiteTransformer2DModel": "it is a part of a U-Net: a thousand tokens where it has self-attention",
    "GlmImageTransformer2DModel": _PAIRS,
    "HiDreamImageTransformer2DModel": _OWN_CALL,
    "HunyuanDiT2DModel": _OWN_CALL,
    "LuminaNextDiT2DModel": _OWN_CALL_2K,
    "Lumina2Transformer2DModel": _OWN_CALL,
    "NucleusMoEImageTransformer2DModel": _TEXT_KEYS,
    "OmniGenTransformer2DModel": "its text is causal and its images are not, which a mask of pairs of tokens says",
    "PRXTransformer2DModel": _TEXT_KEYS,
    "PixArtTransformer2DModel": _OWN_CALL_2K,
    "QwenImage21Transformer2DModel": "its text and image tokens are packed into one masked sequence",
    "SanaTransformer2DModel": "its self-attention is linear in the number of tokens",
    "Transformer2DModel": _OWN_CALL,
    # neither
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "PriorTransformer": "it makes an embedding: some hundred tokens",
    "RFD4ProteinaTransformer": "it makes proteins: some hundred tokens with a bias of pairs",
    "StableAudio3DiTModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
}
