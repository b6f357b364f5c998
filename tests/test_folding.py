"""A reward model folded to one logit equals v . r; a policy with a baked-in direction needs no variable.
pytest tests/test_folding.py
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CHAT_TEMPLATE, SPACE, save_tiny_model, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ModelFileError
from dpa.core.objective import Objective
from dpa.core.sections.reward import RewardConfig, RewardTrainConfig
from dpa.core.sentences import target_template_of
from dpa.core.targets import read_wish, sentence
from dpa.models.chat_template import steerable_template
from dpa.models.files import load_space, resolve_model
from dpa.models.policy import save_policy
from dpa.sampling.samplers import SamplerSpec
from dpa.scoring.folding import attribute_space, bake_direction, chat_template_of, fold_reward, reward_spec
from dpa.scoring.reward_model import PUBLISHED_CONVERSATION, RELEASED_SPEC, Precision, encode, read_spec, write_spec
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.scoring.scorers import build_scorer
from dpa.training.reward_rows import RatedExample
from dpa.training.reward_training import train_reward_model

ATTRIBUTES = ("helpful", "wordy", "kind")
OBJECTIVES = DirectionSpace(
    (Objective("helpfulness", {"helpful": 0.5, "kind": 0.5}), Objective("verbosity", {"wordy": 1.0}))
)
ASKED = OBJECTIVES.parse("helpfulness*0.8 - verbosity*0.6")
TOLERANCE = 5e-3
"""On 0-100, in fp32. A head fitted to a random encoder has weights of hundreds that cancel; others are within 2e-4."""
TALKS = [
    ([{"role": "user", "content": "Why?"}], "Because."),
    ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}], "You, of course, my friend."),
    (
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "No"},
        ],
        "",
    ),
]


@pytest.fixture(scope="module", params=["mistral", "qwen2", "bert"])
def reward_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained reward model: a plain template where the model has no chat template, a head with a bias for BERT."""
    folder = tmp_path_factory.mktemp(request.param)
    backbone = folder / "backbone"
    if request.param == "bert":
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        BertModel(BertConfig(vocab_size=261, pad_token_id=0, **sizes)).save_pretrained(backbone)
        tokenizer = tiny_tokenizer(None)  # it marks both ends of a text, as [CLS] and [SEP] do
        ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|user|>", "<|end|>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|user|> $A <|end|>", special_tokens=ends)
        tokenizer.save_pretrained(backbone)
    else:
        save_tiny_model(backbone, request.param, chat_template=CHAT_TEMPLATE if request.param == "qwen2" else None)
    rng = np.random.default_rng(0)
    examples = [
        RatedExample(
            f"p{n}", [{"role": "user", "content": f"Why {n}?"}], "So. " * (n % 4), tuple(rng.uniform(0, 100, 3))
        )
        for n in range(12)
    ]
    scales = dict.fromkeys(ATTRIBUTES, (0.0, 100.0))
    config = RewardTrainConfig(backbone=str(backbone), method="ridge", ridge_penalty=1000.0)
    train_reward_model(examples, ATTRIBUTES, scales, config, folder / "reward")
    return folder / "reward"


def test_the_logit_is_the_utility_in_plain_transformers(reward_folder: Path, tmp_path: Path) -> None:
    fold_reward(reward_folder, OBJECTIVES, ASKED, tmp_path / "folded")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "folded").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folded")
    assert model.config.num_labels == 1
    spec = read_spec(reward_folder)
    prompts, responses = [talk[0] for talk in TALKS], [talk[1] for talk in TALKS]
    scores_NM = RewardModelScorer(reward_folder).score(prompts, responses)
    utility_N = OBJECTIVES.combine(scores_NM, ATTRIBUTES) @ np.array(ASKED.weights)
    for (messages, response), utility in zip(TALKS, utility_N, strict=True):
        text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        assert inputs["input_ids"][0].tolist() == encode(tokenizer, spec.template, 256, [messages], [response])[0]
        with torch.inference_mode():
            assert model(**inputs).logits[0, 0].item() == pytest.approx(utility, abs=TOLERANCE)
    folded = RewardModelScorer(tmp_path / "folded")
    assert folded.attributes == ("utility",)
    assert folded.score(prompts, responses)[:, 0] == pytest.approx(utility_N, abs=TOLERANCE)


def test_trls_reward_trainer_reads_what_the_reward_model_read(reward_folder: Path, tmp_path: Path) -> None:
    """It wants one logit and goes by the chat template: its token ids are those the reward model was trained on."""
    from datasets import Dataset
    from trl import RewardConfig as TrlConfig
    from trl import RewardTrainer

    fold_reward(reward_folder, OBJECTIVES, ASKED, tmp_path / "folded")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "folded")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folded")
    prompt, response = TALKS[1]
    rows = {"prompt": [prompt], "chosen": [[{"role": "assistant", "content": response}]],
            "rejected": [[{"role": "assistant", "content": "No."}]]}  # fmt: skip
    arguments = TrlConfig(output_dir=str(tmp_path / "trl"), max_steps=1, report_to="none", use_cpu=True, bf16=False,
                          gradient_checkpointing=False, per_device_train_batch_size=1, disable_tqdm=True)  # fmt: skip
    trainer = RewardTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer
    )
    (ids,) = encode(
        AutoTokenizer.from_pretrained(reward_folder), read_spec(reward_folder).template, 256, [prompt], [response]
    )
    assert trainer.train_dataset[0]["chosen_ids"] == ids
    trainer.train()
    assert trainer.state.global_step == 1


def test_without_a_space_every_attribute_is_an_objective(reward_folder: Path, tmp_path: Path) -> None:
    space = attribute_space(reward_spec(reward_folder))
    fold_reward(reward_folder, space, space.parse("-wordy"), tmp_path / "folded")
    before = RewardModelScorer(reward_folder).score([TALKS[0][0]], [TALKS[0][1]])
    after = RewardModelScorer(tmp_path / "folded").score([TALKS[0][0]], [TALKS[0][1]])
    assert after[0, 0] == pytest.approx(-before[0, 1], abs=TOLERANCE)


def test_what_bf16_costs_is_known_of_the_folded_model_too(reward_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reward_folder, tmp_path / "reward"))
    spec = read_spec(folder)
    turned = replace(spec, precision=Precision("bfloat16", 64, 1.5, 0.9))
    write_spec(folder, turned, {})
    fold_reward(folder, OBJECTIVES, ASKED, tmp_path / "folded")
    found = read_spec(tmp_path / "folded").precision
    assert found is not None and not found.keeps_order
    assert found.largest_difference == pytest.approx(1.5 * (0.8 + 0.6))


def test_a_changed_reward_model_is_not_folded(reward_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(reward_folder, tmp_path / "reward")
    weights = load_file(tmp_path / "reward/model.safetensors")
    head = next(name for name in weights if name in ("score.weight", "classifier.weight"))
    weights[head] = weights[head] * 2
    save_file(weights, tmp_path / "reward/model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileError, match="golden"):
        fold_reward(tmp_path / "reward", OBJECTIVES, ASKED, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_the_published_template_as_a_chat_template() -> None:
    tokenizer = tiny_tokenizer(chat_template_of(PUBLISHED_CONVERSATION))
    golden = RELEASED_SPEC.golden
    talk = [*golden.messages, {"role": "assistant", "content": golden.response}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert text == PUBLISHED_CONVERSATION.format(prompt=golden.messages[0]["content"], response=golden.response)


def test_a_copy_of_the_released_reward_model_is_read_by_its_preset(tmp_path: Path) -> None:
    """No dpa_reward.json, padding with EOS as many published models do; its golden vector is still asked for."""
    from transformers import MistralForSequenceClassification

    tiny = tiny_model("mistral", context=1024)
    config = tiny.config
    config.num_labels = 10
    model = MistralForSequenceClassification(config).eval()
    model.config.pad_token_id = 1
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match=r"dpa_reward\.json"):
        build_scorer(RewardConfig(folder=str(tmp_path)))
    with pytest.raises(ModelFileError, match="golden example"):
        build_scorer(RewardConfig(folder=str(tmp_path), preset="dpa-v1"))
    # Its last layer made to say what the released one says, the preset reads it.
    ids = encode(
        tokenizer, RELEASED_SPEC.template, 4096, [RELEASED_SPEC.golden.messages], [RELEASED_SPEC.golden.response]
    )
    with torch.no_grad():
        hidden = model.model(torch.tensor(ids)).last_hidden_state[0, -1]
        target = torch.tensor(RELEASED_SPEC.golden.scores)
        model.score.weight.copy_(target[:, None] * hidden[None] / hidden.square().sum())
    model.save_pretrained(tmp_path)
    scorer = build_scorer(RewardConfig(folder=str(tmp_path), preset="dpa-v1"))
    assert scorer.attributes == RELEASED_SPEC.attributes
    fold_reward(tmp_path, attribute_space(RELEASED_SPEC), attribute_space(RELEASED_SPEC).parse("helpsteer-helpfulness"),
                tmp_path / "folded", released=True)  # fmt: skip
    golden = RELEASED_SPEC.golden
    assert RewardModelScorer(tmp_path / "folded").score([golden.messages], [golden.response])[0, 0] == pytest.approx(
        68.99, abs=0.1
    )


def test_a_baked_direction_is_stated_by_default_and_a_preference_still_wins(tmp_path: Path) -> None:
    direction = SPACE.parse("helpfulness*0.8 - verbosity*0.6")
    save_policy(tiny_model(), tiny_tokenizer(), tmp_path / "policy", SPACE, {"from": "test"})
    bake_direction(tmp_path / "policy", SPACE, direction, tmp_path / "baked")
    plain, baked = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("policy", "baked"))
    question = [{"role": "user", "content": "Why?"}]
    render = {"tokenize": False, "add_generation_prompt": True}
    asked = plain.apply_chat_template(question, preference=direction.as_mapping(), **render)
    assert SPACE.prompt(direction) in asked
    assert baked.apply_chat_template(question, **render) == asked
    other = {"helpfulness": 1.0}
    assert baked.apply_chat_template(question, preference=other, **render) == plain.apply_chat_template(
        question, preference=other, **render
    )
    weights = (tmp_path / name / "model.safetensors" for name in ("policy", "baked"))
    assert len({file.read_bytes() for file in weights}) == 1
    assert load_space(tmp_path / "baked") == SPACE
    resolve_model(tmp_path / "baked")
    # dpa's own sampler states what it is asked, and nothing where it is asked nothing: the template is taught anew.
    again = steerable_template(baked.chat_template, SPACE)
    assert again == steerable_template(CHAT_TEMPLATE, SPACE)
    SamplerSpec(str(tmp_path / "baked"), SPACE, 4, revision="x").build()


def test_a_target_is_baked_in_like_a_direction(tmp_path: Path) -> None:
    space = replace(SPACE, target_template=target_template_of(SPACE.template))
    target = read_wish(space, "helpfulness; verbosity=40")
    save_policy(tiny_model(), tiny_tokenizer(), tmp_path / "policy", space, {"from": "test"})
    bake_direction(tmp_path / "policy", space, target, tmp_path / "baked")
    baked = AutoTokenizer.from_pretrained(tmp_path / "baked")
    shown = baked.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
    assert sentence(space, target) in shown
