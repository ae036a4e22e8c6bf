"""limbeck's own architectures as transformers knows them, by `model_type`.

The one idea: `limbeck.registration` puts names into transformers' tables and asks here for the classes when one of them
is used, so that `import limbeck` stays light.
"""

from typing import Any

from limbeck.registration import COMPRESSED_PREFIX, MHC_PREFIX, OWN_TYPES


def own_config_class(model_type: str) -> Any:
    """The config class of one of our model types; makes its causal LM known to `AutoModelForCausalLM`."""
    if model_type.startswith(MHC_PREFIX):
        from limbeck.students.mhc.models import streamed_config, streamed_model

        base = model_type.removeprefix(MHC_PREFIX)
        streamed_model(base)
        return streamed_config(base)
    if model_type.startswith(COMPRESSED_PREFIX):
        from limbeck.students.compressed.models import compressed_config, compressed_model

        base = model_type.removeprefix(COMPRESSED_PREFIX)
        compressed_model(base)
        return compressed_config(base)
    from transformers import AutoModelForCausalLM

    from limbeck.students.retnet_hrm.configuration import RetNetHRMConfig
    from limbeck.students.retnet_hrm.modeling import RetNetHRMForCausalLM

    AutoModelForCausalLM.register(RetNetHRMConfig, RetNetHRMForCausalLM, exist_ok=True)
    return RetNetHRMConfig


def __getattr__(name: str) -> Any:
    """Classes that are made when they are asked for, by name, for pickle."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    prefix = {"MHC": MHC_PREFIX, "Compressed": COMPRESSED_PREFIX}.get("MHC" if name[:3] == "MHC" else name[:10], "")
    for model_type in OWN_TYPES if prefix else ():
        if model_type.startswith(prefix):
            config = own_config_class(model_type)
            for made in (config, MODEL_FOR_CAUSAL_LM_MAPPING[config]):
                if made.__name__ == name:
                    return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
