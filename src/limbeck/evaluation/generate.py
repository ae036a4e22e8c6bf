"""A sample of what a model writes: transformers' own generate, seeded."""

from limbeck.config import ModelSource
from limbeck.config.recipe import GenerationConfig
from limbeck.data.tokenizer import load_tokenizer
from limbeck.models import load_frozen


def write_sample(
    settings: GenerationConfig, source: ModelSource, device: str | None = None, dtype: str = "auto"
) -> str:
    """Continue the prompt with a model; returns prompt and continuation."""
    from transformers import set_seed

    tokenizer = load_tokenizer(*source).hf
    model = load_frozen(source, dtype, device)
    set_seed(settings.seed)
    inputs = tokenizer(settings.prompt, return_tensors="pt").to(model.device)
    sampling = (
        {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
        }
        if settings.temperature > 0.0
        else {"do_sample": False}
    )
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text
