"""The commands: one table of what each does, its own flags, and the keys that its help shows first."""

from dataclasses import dataclass, field

#: Switches that are no keys, by name: what they do.
SWITCHES = {
    "dry-run": "Check everything and say what would be done; nothing is written.",
    "force": "Make the result again; the old one goes to previous/, or in a folder that you named is deleted.",
    "skip-existing": "Leave a complete folder as it is, whatever it was made from.",
    "verify": "Compare what was written with the student, and run it through llama.cpp where that is installed.",
    "pretrain-ce-only": "No teacher: training.mode ce.",
    "tiny": "The recipe's own small variant: the keys of its section `tiny` are laid over it.",
    "prune": "Delete the earlier results that lie in previous/.",
    "json": "Print the result as one JSON document on stdout.",
}


@dataclass(frozen=True)
class Subcommand:
    """A command.

    Attributes:
        function: in `limbeck.commands`.
        help: what it does, in a line.
        switches: names of `SWITCHES` that it takes, beside `json`.
        aliases: its own short flags, and the keys they set.
        first: further keys that its help shows.
        word: what a bare first word may be: `recipe`, or the key that it sets where it is none.
        needs_recipe: it does nothing without one.
    """

    function: str
    help: str
    switches: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    first: tuple[str, ...] = ()
    word: str = "recipe"
    needs_recipe: bool = False


_DATA = ("dataset.name", "dataset.max_length", "dataset.text_column", "dataset.max_samples", "tokenizer.name")
_TEACHER = ("teacher.model", "teacher.remote.endpoint", "teacher.top_k", "teacher.use_cached_logits")
_TRAINING = (
    "student.model",
    "student.ternary",
    "loss.alpha",
    "loss.temperature",
    "loss.divergence",
    "optimizer.name",
    "training.learning_rate",
    "training.max_steps",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "training.warmup_steps",
    "training.save_steps",
    "training.eval_steps",
    "training.resume_from",
    "training.device",
    "training.bf16",
    "training.report_to",
)

_ENGINE = {"threads": "engine.threads", "numa-aware": "engine.numa_aware", "cache": "engine.cache"}

SUBCOMMANDS: dict[str, Subcommand] = {
    "run": Subcommand(
        "run",
        "Run every stage of a recipe; what is done already is skipped.",
        ("dry-run", "pretrain-ce-only", "tiny"),
        {"output-dir": "output_dir"},
        first=("name", *_DATA, *_TEACHER, *_TRAINING, "pipeline.export"),
        needs_recipe=True,
    ),
    "train": Subcommand(
        "train",
        "Train the student, with its teacher or with cross-entropy alone.",
        ("dry-run", "force", "pretrain-ce-only", "tiny"),
        first=("output_dir", *_TRAINING, *_TEACHER, *_DATA),
    ),
    "eval": Subcommand(
        "eval_student",
        "Score a model on the held-out rows: perplexity, bits/byte, fidelity.",
        (),
        {"model": "evaluation.model", "batch-size": "evaluation.batch_size", "max-rows": "evaluation.max_rows"},
        first=("evaluation.suites", "teacher.model", "training.device"),
    ),
    "generate": Subcommand(
        "generate",
        "Write a sample of text.",
        (),
        {
            "model": "generation.model",
            "prompt": "generation.prompt",
            "max-new-tokens": "generation.max_new_tokens",
            "temperature": "generation.temperature",
            "top-k": "generation.top_k",
            "top-p": "generation.top_p",
            **_ENGINE,
            "draft": "engine.draft",
        },
        first=("generation.seed", "training.device", "engine.draft_tokens"),
    ),
    "serve": Subcommand(
        "serve_file",
        "Serve a GGUF file over HTTP, as OpenAI's API.",
        (),
        {
            "host": "server.host",
            "port": "server.port",
            "api-key-env": "server.api_key_env",
            "max-concurrent": "server.max_concurrent",
            "ctx-size": "server.ctx_size",
            **_ENGINE,
        },
        first=("server.name", "server.max_waiting", "server.allowed_hosts"),
        word="server.model",
    ),
    "bench": Subcommand(
        "bench",
        "Time a GGUF file here: prefill and decoding by threads, and their share of the machine's limits.",
        (),
        {"prefill": "bench.prefill", "decode": "bench.decode", "repeats": "bench.repeats", **_ENGINE},
        word="bench.model",
    ),
    "export": Subcommand(
        "export",
        "Write a finished student for other programs: GGUF, packed or plain safetensors.",
        ("verify",),
        {
            "input": "export.input",
            "output": "export.output",
            "format": "export.format",
            "type": "export.type",
            "embedding": "export.embedding",
            "rest": "export.rest",
            "group-size": "export.group_size",
        },
        first=("export.verify_tokens",),
    ),
    "inspect": Subcommand(
        "inspect",
        "List a GGUF file's tensors, types, sizes and bits a weight.",
        (),
        {"input": "export.input"},
    ),
    "data pack": Subcommand(
        "data_pack",
        "Tokenise text and pack it into Parquet rows.",
        ("dry-run", "force", "skip-existing", "tiny"),
        {"input": "dataset.name", "output": "dataset.packed_dir", "output-dir": "dataset.packed_dir"},
        first=(*_DATA[1:], "dataset.validation_fraction", "dataset.num_proc"),
    ),
    "compress": Subcommand(
        "compress",
        "Compress a model in closed form: experts, layers, feed-forward channels.",
        ("dry-run", "force", "skip-existing", "tiny"),
        {
            "method": "compress.method",
            "rank": "compress.rank",
            "keep": "compress.keep",
            "keep-layers": "compress.keep_layers",
            "keep-ffn": "compress.keep_ffn",
            "calibration": "dataset.name",
            "calibration-rows": "compress.calibration_rows",
            "output": "compress.output_dir",
        },
        first=("dataset.max_length", "training.device"),
        word="teacher.model",
    ),
    "teacher cache": Subcommand(
        "teacher_cache",
        "Run the teacher once and keep its top-k targets in HDF5.",
        ("dry-run", "force", "skip-existing", "tiny"),
        {"output-dir": "teacher.cache.dir", "batch-size": "teacher.local.batch_size", "device": "teacher.local.device"},
        first=("teacher.model", "teacher.remote.endpoint", "teacher.top_k", "teacher.temperatures", *_DATA),
    ),
    "teacher probe": Subcommand(
        "teacher_probe",
        "Find out what an endpoint speaks and gives, test its alignment, measure it.",
        (),
        {
            "endpoint": "teacher.remote.endpoint",
            "protocol": "teacher.remote.protocol",
            "model": "teacher.model",
            "api-key-env": "teacher.remote.api_key_env",
        },
        first=("tokenizer.name", "teacher.top_k"),
        word="teacher.remote.endpoint",
    ),
    "teacher serve": Subcommand(
        "teacher_serve",
        "Serve a model's targets over HTTP.",
        (),
        {
            "model": "teacher.model",
            "dtype": "teacher.local.dtype",
            "device": "teacher.local.device",
            "max-batch-tokens": "teacher.local.max_batch_tokens",
            "host": "teacher_server.host",
            "port": "teacher_server.port",
            "quantization": "teacher_server.quantization",
            "adapter": "teacher_server.adapter",
            "api-key-env": "teacher_server.api_key_env",
        },
        word="teacher.model",
    ),
    "runs": Subcommand(
        "runs",
        "List what a folder of runs holds, earlier results and what differs in them; --prune deletes those.",
        ("prune", "dry-run"),
        word="output_dir",
    ),
    "config show": Subcommand("config_show", "Print the resolved recipe."),
    "config schema": Subcommand("config_schema", "Print the JSON schema of recipes."),
}

#: What a group of commands is about.
GROUPS = {
    "data": "Text to rows of tokens.",
    "teacher": "Teachers: their targets, near or far.",
    "config": "Recipes: what they mean, and their schema.",
}
#: The key that names the model of a command, where its word may be one.
MODEL_KEYS = {"eval_student": "evaluation.model", "generate": "generation.model", "export": "export.input"}
#: How usage names a bare first word.
_WORDS = {
    "recipe": "[RECIPE.yaml | RUN]",
    "teacher.remote.endpoint": "[URL | RECIPE.yaml]",
    "teacher.model": "[MODEL | RECIPE.yaml]",
    "output_dir": "[FOLDER]",
    "bench.model": "[FILE.gguf | RUN]",
    "server.model": "[FILE.gguf | RUN]",
}


def usage_word(sub: Subcommand) -> str:
    """The bare word as usage shows it."""
    if sub.function == "inspect":
        return "[FILE.gguf | RUN]"
    return "[RECIPE.yaml | RUN | MODEL]" if sub.function in MODEL_KEYS else _WORDS[sub.word]
