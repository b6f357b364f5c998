"""Policies on disk: a plain Hugging Face folder whose chat template reads a direction, plus `dpa_config.json`.
Run its tests: pytest tests/test_policy.py
"""

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ModelFileError
from dpa.core.records import Messages
from dpa.core.reference import Model, ModelReference
from dpa.core.sentences import weighted_rating
from dpa.core.targets import Held, preference_of
from dpa.models.attention import may_go_on
from dpa.models.chat_template import ending_answers, steerable_template
from dpa.models.disk_refusals import disk_refusals
from dpa.models.files import CONTENT_SUFFIXES, EVALUATION_FILE, SPACE_FILE, SafeModel, resolve_model
from dpa.models.half_precision import computes_in_bf16
from dpa.models.loading import (
    check_loadable,
    check_tokens,
    check_weights,
    embedding_rows,
    load_generation,
    load_model,
    load_model_config,
    load_tokenizer,
)
from dpa.models.quiet import quiet_libraries
from dpa.models.shared_prefixes import LEAST_SHARED, group_families, tokens_read
from dpa.models.template_rendering import render_chat, render_chats
from dpa.storage.schemas import held_values
from dpa.storage.seals import check_in_run
from dpa.storage.tables import save_folder_atomically, write_json

_PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>")


def load_policy(
    policy: Model,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in eval mode, on `device` (default: the GPU where there is one).

    The tokenizer pads on the left, with a token that differs from EOS where its vocabulary has one; the vocabulary
    is never resized. Code of its own runs where its reference opts in (see models/files.py).

    Raises ModelFileError.
    """
    safe = resolve_model(policy)
    with quiet_libraries():
        model = load_model(AutoModelForCausalLM, safe, dtype)
        tokenizer = load_tokenizer(safe)
    check_end_token(tokenizer, policy)
    tokenizer.padding_side = "left"
    ensure_pad_token(tokenizer)
    check_tokens(tokenizer, embedding_rows(model), policy)
    model.to(device or default_device())  # type: ignore[arg-type]
    return model.eval(), tokenizer


def check_policy(policy: Model, space: DirectionSpace | None = None) -> None:
    """What can be known of a start policy before hours are spent: its files, its configuration, its tokens, and with a
    `space` whether its chat template can be made to state a direction.

    Weights are compared by name and shape; those of another run also with their seal. Raises ModelFileError,
    RunFolderError.
    """
    safe = resolve_model(policy)
    check_in_run(safe.path)
    with quiet_libraries():
        check_weights(AutoModelForCausalLM, safe)
        tokenizer = load_tokenizer(safe)
        check_end_token(tokenizer, policy)
        ensure_pad_token(tokenizer)
        check_tokens(tokenizer, embedding_rows(safe), policy)
        load_generation(safe)
        if space is not None:
            make_steerable(tokenizer, space)


def load_prompting(policy: SafeModel) -> tuple[PreTrainedTokenizerBase, int, tuple[int, ...]]:
    """Of a checked folder, without its weights: tokenizer, context in tokens, end tokens. Raises ModelFileError."""
    with quiet_libraries():
        config, tokenizer = load_model_config(policy), load_tokenizer(policy)
        generation = load_generation(policy) or GenerationConfig.from_model_config(config)
    ensure_pad_token(tokenizer)
    return tokenizer, _positions(config), _end_ids(generation, tokenizer)


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    space: DirectionSpace,
    extra: dict[str, Any],
) -> None:
    """Save weights (safetensors), tokenizer with steerable chat template, and `dpa_config.json`: whole or not at all.

    `extra` (JSON-able) says where the policy comes from. The folder loads with plain `from_pretrained` anywhere.
    What was written is opened again as a stranger would. Raises StorageError or RunFolderError when the disk refuses,
    ModelFileError when it would not load.
    """
    make_steerable(tokenizer, space)
    with save_folder_atomically(folder) as unfinished, disk_refusals(folder, "saving the model"):
        if getattr(model.config, "use_cache", None) is False:  # by training; other programs would generate without one
            model.config.use_cache = True
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        write_json(unfinished / SPACE_FILE, {"space": space.to_dict(), "provenance": extra})
        saved = ModelReference(str(unfinished), extra.get("remote_code_revision"))
        check_loadable(saved, AutoModelForCausalLM, f"policy {folder}")


def copy_policy(
    policy: Model, tokenizer: PreTrainedTokenizerBase, folder: Path, space: DirectionSpace, extra: dict[str, Any]
) -> None:
    """A policy's files byte for byte, but for its tokenizer, its card and `dpa_config.json`: whole or not at all.

    `tokenizer` has the chat template that the copy is to have; `extra` as in `save_policy`. Raises as that does.
    """
    safe = resolve_model(policy)
    with save_folder_atomically(folder) as unfinished, disk_refusals(folder, "copying the model"):
        for file in Path(safe.path).iterdir():
            if file.suffix in CONTENT_SUFFIXES and file.name != EVALUATION_FILE and file.is_file():
                shutil.copy2(file, unfinished / file.name)
        tokenizer.save_pretrained(unfinished)
        write_json(unfinished / SPACE_FILE, {"space": space.to_dict(), "provenance": extra})
        saved = ModelReference(str(unfinished), ModelReference.of(policy).code_revision)
        check_loadable(saved, AutoModelForCausalLM, f"policy {folder}")


def check_steerable(policy: Model, space: DirectionSpace) -> None:
    """The folder's own chat template states the space's `preference`, for programs that read it there. Raises
    ModelFileError."""
    tokenizer = load_tokenizer(resolve_model(policy))
    question: Messages = [{"role": "user", "content": "Why?"}]
    asked = (tokenizer, space, question, space.direction(space.center).weights)
    own = encode_prompt(*asked) if tokenizer.chat_template else None
    make_steerable(tokenizer, space)
    if encode_prompt(*asked) != own:
        raise ModelFileError(
            f"model: the chat template in {policy} does not read `preference` as this space states it; "
            "`dpa export MODEL --bake DIRECTION --out FOLDER` writes a copy whose template does."
        )


def make_steerable(tokenizer: PreTrainedTokenizerBase, space: DirectionSpace) -> None:
    """Teach the tokenizer's chat template the space's `preference` (models/chat_template.py).

    Raises ModelFileError where it has no tokens for zero-padded weights.
    """
    stated = weighted_rating(space.names, space.direction(space.center).integers, zero_padded=True)
    if space.zero_padded and tokenizer.unk_token_id in tokenizer(stated, add_special_tokens=False)["input_ids"]:
        raise ModelFileError(f"space.zero_padded: the model's tokenizer has no tokens for `{stated}`; let it be false.")
    base = tokenizer.get_chat_template() if tokenizer.chat_template else None
    tokenizer.chat_template = steerable_template(base, space)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token that is not EOS, from its own vocabulary; EOS itself where there is none."""
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return
    vocabulary = tokenizer.get_vocab()
    choices = [*_PAD_TOKENS, tokenizer.unk_token]
    found = [token for token in choices if token in vocabulary and token != tokenizer.eos_token]
    tokenizer.pad_token = found[0] if found else tokenizer.eos_token


def check_end_token(tokenizer: PreTrainedTokenizerBase, policy: Model) -> None:
    """A policy can stop. Raises ModelFileError."""
    if tokenizer.eos_token_id is None:
        raise ModelFileError(
            f"model: the tokenizer of {policy} has no EOS token; set eos_token in tokenizer_config.json."
        )


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's EOS and those of the generation config."""
    return _end_ids(model.generation_config, tokenizer)


def _end_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    declared = generation.eos_token_id if generation else None
    declared = declared if isinstance(declared, list) else [declared]
    return tuple(sorted({token for token in [tokenizer.eos_token_id, *declared] if token is not None}))


def context_length(model: PreTrainedModel) -> int:
    """Longest sequence the model has positions for, in tokens."""
    return _positions(model.config)


def _positions(config: PreTrainedConfig) -> int:
    config = config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1_000_000)  # no limit declared (ALiBi, recurrent)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: torch.OutOfMemoryError on a GPU, a plain RuntimeError on a CPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in said for words in ("out of memory", "not enough memory", "can't allocate memory")
    )


def default_device() -> str:
    """The GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    space: DirectionSpace,
    messages: Messages,
    direction: Sequence[float] | None,
    held: Held | None = None,
) -> list[int]:
    """Token ids the policy is shown before it answers, the direction (K weights) or target (with K `held` values,
    core/targets.py) stated by its chat template.

    Raises jinja2.TemplateError where the template refuses the messages, UnicodeError or TypeError where they are no
    text.
    """
    preference = None if direction is None else preference_of(space.names, direction, held)
    chat: Any = [{"role": message["role"], "content": message["content"]} for message in messages]
    return encode_chat(tokenizer, chat, preference=preference)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    space: DirectionSpace,
    asked: Sequence[tuple[Messages, Sequence[float] | None, Held | None]],
) -> list[list[int] | None]:
    """`encode_prompt` of each (messages, direction, held values), rendered and cut into tokens together; None where the
    template refuses the messages. Raises KeyError, UnicodeError or TypeError where one of them is no text."""
    chats = [[{"role": one["role"], "content": one["content"]} for one in messages] for messages, _, _ in asked]
    preferences = [None if v is None else preference_of(space.names, v, held) for _, v, held in asked]
    own = [{"add_generation_prompt": True, "preference": preference} for preference in preferences]
    texts = render_chats(tokenizer, chats, own)
    written = [text for text in texts if text is not None]
    ids = iter(tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"] if written else ())
    return [None if text is None else next(ids) for text in texts]


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, **variables: Any) -> list[int]:
    """Token ids of messages that await an answer, the chat template given `variables`. Raises like `render_chat`."""
    text = render_chat(tokenizer, messages, **{"add_generation_prompt": True, **variables})
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def shares_beginnings(policy: Model, bf16: bool | Literal["auto"]) -> bool:
    """Whether a training of the policy on this machine's device can read once what prompts begin with. Its weights are
    not loaded. Raises ModelFileError."""
    safe = resolve_model(policy)
    with quiet_libraries(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_model_config(safe), **safe.tokenizer_kwargs)
    dtype = torch.bfloat16 if computes_in_bf16(bf16) else torch.float32
    return may_go_on(model, dtype, torch.device(default_device()))


def count_tokens(
    policy: Model, rows: pa.Table, space: DirectionSpace, packed: int | None = None, longest: int | None = None
) -> int:
    """Tokens of rows in the columns of a select shard, as finetuning would read them: prompt, response, end token.

    `packed`: what prompts share is counted once in a row of as many tokens (training/packing.py). Only the tokenizer is
    loaded. A row of more than `longest` tokens, which finetuning rejects, does not count. Raises ModelFileError.
    """
    safe = resolve_model(policy)
    with quiet_libraries():
        tokenizer = load_tokenizer(safe)
    make_steerable(tokenizer, space)
    columns = (rows[column].to_pylist() for column in ("messages", "direction", "response"))
    prompts, answers = [], []
    for messages, direction, response, held in zip(*columns, held_values(rows), strict=True):
        prompt = encode_prompt(tokenizer, space, json.loads(messages), direction, held)
        answer = len(tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]) + 1
        if longest is None or len(prompt) + answer <= longest:
            prompts.append(prompt)
            answers.append(answer)
    if packed is None:
        return sum(map(len, prompts)) + sum(answers)
    found = group_families([[ids] for ids in prompts], answers, packed, LEAST_SHARED)
    return tokens_read(prompts, found) + sum(answers)


def turn_end_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token a response is trained to end with: the one the chat template ends an answer with, else EOS."""
    written = _written_end(tokenizer, end_token_ids(model, tokenizer))
    return tokenizer.eos_token_id if written is None else written


def make_answers_end(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> bool:
    """Teach the chat template to write an end token after an answer, where it writes none of `ends`: trainers that read
    whole conversations would never teach a policy to stop. Returns whether it had to be taught."""
    taught = _written_end(tokenizer, ends) is None
    if taught:
        tokenizer.chat_template = ending_answers(str(tokenizer.get_chat_template()))
    return taught


def _written_end(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> int | None:
    """The token of `ends` that the chat template writes first after an answer."""
    question = [{"role": "user", "content": "a"}]
    before = render_chat(tokenizer, question, add_generation_prompt=True)
    talk = render_chat(tokenizer, [*question, {"role": "assistant", "content": "b"}])
    tail = tokenizer(talk.removeprefix(before), add_special_tokens=False)["input_ids"]
    return next((token for token in tail if token in ends), None)
