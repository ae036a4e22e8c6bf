"""limbeck's own architectures as transformers knows them, by `model_type`.

The one idea: `limbeck.registration` puts names into transformers' tables and asks here for the classes when one of them
is used, so that `import limbeck` stays light.
"""

from typing import Any

from limbeck.registration import MHC_PREFIX


def own_config_class(model_type: str) -> Any:
    """The config class of one of our model types; makes its causal LM known to `AutoModelForCausalLM`."""
    if model_type.startswith(MHC_PREFIX):
        from limbeck.students.mhc.models import streamed_config, streamed_model

        base = model_type.removeprefix(MHC_PREFIX)
        streamed_model(base)
        return streamed_config(base)
    from transformers import AutoModelForCausalLM

    from limbeck.students.retnet_hrm.configuration import RetNetHRMConfig
    from limbeck.students.retnet_hrm.modeling import RetNetHRMForCausalLM

    AutoModelForCausalLM.register(RetNetHRMConfig, RetNetHRMForCausalLM, exist_ok=True)
    return RetNetHRMConfig
