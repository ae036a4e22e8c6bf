"""A sample of what a model writes: transformers' own generate, seeded."""

from limbeck.config import Recipe
from limbeck.data.tokenizer import load_tokenizer
from limbeck.models import load_causal_lm
from limbeck.teachers.choose import choose_device


def generate(recipe: Recipe, model_name: str) -> str:
    """Continue `generation.prompt` with the model in a folder; returns prompt and continuation."""
    from transformers import set_seed

    settings = recipe.generation
    tokenizer = load_tokenizer(model_name).hf
    model = load_causal_lm(model_name, dtype="auto").to(choose_device(recipe.training.device)).eval()
    set_seed(settings.seed)
    inputs = tokenizer(settings.prompt, return_tensors="pt").to(model.device)
    sampling = (
        {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k}
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
