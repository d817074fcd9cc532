"""Counts the transformer layers that a configuration of transformers speaks of, over all of its sub-configurations."""

import re

# num_hidden_layers, encoder_layers, depths, n_layer, resampler_depth ...; not num_conv_layers, max_window_layers ...
_COUNT = re.compile(
    r"^(?:\w+_)?num_hidden_layers$|^n_layers?$|^num_layers$|^depths?$|^(?:speech_|t2u_)?(?:en|de)coder_layers$"
    r"|^num_(?:en|de)coder_layers$|^block_sizes$|^(?:\w+_)?resampler_(?:depth|num_layers)$|^memory_attention_num_layers$"
    r"|^num_(?:spatial|temporal|attention|global)_layers$|^[lrx]_layers$|^num_self_attends_per_block$"
    r"|^blocks_per_stage$"
)
CONVOLUTIONAL = {
    "align_vision_model", "bit", "convnext", "convnextv2", "dac", "dinov3_convnext", "efficientnet", "encodec",
    "hgnet_v2", "mobilenet_v1", "mobilenet_v2", "muse_spark_audio", "poolformer", "pp_lcnet", "pp_lcnet_v3",
    "pp_lcnet_v4", "regnet", "resnet", "rt_detr_resnet", "superpoint", "textnet", "univnet", "uvdoc_backbone",
    "vibevoice_acoustic_tokenizer", "vibevoice_acoustic_tokenizer_decoder", "vibevoice_acoustic_tokenizer_encoder",
}  # fmt: skip


def counted_layers(name: str, config: dict) -> int:
    """Returns the layers that the class ``name`` has by its configuration, given as a dictionary."""
    return _count(_of_class(name, config))


def _of_class(name: str, config: dict) -> dict:
    """Leaves out the configuration's half that the class has not."""
    if name.endswith("ForImageClassification") and "vision_config" in config:
        return config["vision_config"]
    both = [key for key in config if re.fullmatch(r"(?:num_)?(?:en|de)coder_layers", str(key))]
    if name.endswith("ForCausalLM"):
        return {key: value for key, value in config.items() if key not in both or "decoder" in key}
    t5 = "num_layers" in config and name.endswith(("EncoderModel", "ForTokenClassification"))
    if t5 or name.endswith("ForAudioClassification"):
        return {key: value for key, value in config.items() if key not in both or "encoder" in key}
    return config


def _count(config: dict) -> int:
    if config.get("model_type") in CONVOLUTIONAL:
        return 0
    own = {key: _sum(value) for key, value in config.items() if isinstance(key, str) and _COUNT.match(key)}
    if own.keys() & {"depths", "block_sizes"}:  # layers by stage, beside which the others count the stages
        own.pop("num_layers", None)
        own.pop("num_hidden_layers", None)
    if own.keys() & {"encoder_layers", "decoder_layers", "num_encoder_layers"}:  # which it repeats
        own.pop("num_hidden_layers", None)
    if "num_hidden_layers" not in config and "layers_block_type" in config:
        own["layers_block_type"] = len(config["layers_block_type"])
    inner = (value for key, value in config.items() if isinstance(value, dict))
    return sum(own.values()) + sum(map(_count, inner))


def _sum(value) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(_sum, value))
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
