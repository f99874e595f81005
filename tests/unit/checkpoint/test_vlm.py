"""Start weights of a judge of pixels: VideoAlign's and PEFT's layouts, adapters merged or kept, in a tiny Qwen2-VL."""

import importlib
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from afd_scale.checkpoint.formats.vlm import Answers, load_vlm_state
from afd_scale.config.judges import QUESTION, VlmDiscriminatorConfig
from afd_scale.evaluation.suites.reward_model import RewardModel
from afd_scale.layers.lora import Adapters
from afd_scale.layers.ops import ModelOps
from afd_scale.models.vlm import VlmDiscriminator
from afd_scale.types import Videos
from tests.judges import save_tiny_judge
from tests.networks import make_prompts

RANK, ALPHA = 2, 3.0
REWARDS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
TEMPLATE = "{video}{prompt} VQ <|VQ_reward|> MQ <|MQ_reward|> TA <|TA_reward|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def scorer(model):
    """As VideoAlign makes it: three tokens more, the table cut to the tokenizer, a head, adapters by PEFT."""
    transformers = importlib.import_module("transformers")
    peft = pytest.importorskip("peft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(REWARDS)}, replace_additional_special_tokens=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        base = transformers.Qwen2VLForConditionalGeneration.from_pretrained(model)
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        base.rm_head = torch.nn.Linear(32, 1, bias=False)
        targets = [name for name, part in base.named_modules()
                   if isinstance(part, torch.nn.Linear) and not re.search("visual|lm_head|rm_head", name)]  # fmt: skip
        wrapped = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "merger" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


def old_names(state):
    """Of transformers before 4.52, which VideoAlign was published with."""
    named = {name.replace(".model.visual.", ".visual."): tensor for name, tensor in state.items()}
    return {name.replace(".model.language_model.", ".model."): tensor for name, tensor in named.items()}


def write_videoalign(folder, scorer, in_one_file):
    """The layout of the published folder, or of its training's own checkpoints."""
    for step in (5, 20):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
    newest, state = folder / "checkpoint-20", old_names(scorer.state_dict())
    if in_one_file:
        torch.save(state, newest / "model.pth")
    else:
        adapters = {name.replace(".default.", "."): tensor for name, tensor in state.items() if "lora_" in name}
        save_file(adapters, newest / "adapter_model.safetensors")
        torch.save({n: t for n, t in state.items() if "lora_" not in n}, newest / "non_lora_state_dict.pth")
    described = {"peft_lora_config": {"lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": False}}
    (folder / "model_config.json").write_text(json.dumps(described))
    return folder


def section(model, **fields):
    fields = {"template": TEMPLATE, "reward_tokens": REWARDS, "min_pixels": 784, "max_pixels": 784, **fields}
    return VlmDiscriminatorConfig.model_validate({"model": str(model), **fields})


def judge_of(config):
    adapters = Adapters(("judge",), config.lora.rank, config.lora.alpha / config.lora.rank) if config.lora else None
    judge = VlmDiscriminator(config, ModelOps(adapters=adapters))
    shapes = {name: parameter.shape for name, parameter in judge.named_parameters()}
    answers = Answers(*judge.tokens.answers, judge.tied) if config.head == "yes_no" else None
    state = load_vlm_state(config, "method.discriminator", "judge", shapes, answers)
    judge.load_state_dict(state, strict=False)
    return judge, state


@torch.no_grad()
@pytest.mark.parametrize("adapters", ["merge", "keep"])
@pytest.mark.parametrize("in_one_file", [True, False], ids=["model.pth", "two files"])
def test_a_videoalign_checkpoint_scores_as_it_did(model, scorer, tmp_path, in_one_file, adapters):
    lora = {"rank": RANK, "alpha": ALPHA} if adapters == "keep" else None
    weights = write_videoalign(tmp_path, scorer, in_one_file)
    judge, state = judge_of(section(model, weights=weights, weights_adapters=adapters, lora=lora))
    assert state.keys() == dict(judge.named_parameters()).keys()
    pixels = torch.rand(2, 4, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    videos = Videos(make_prompts(torch.zeros(2, 1, 1), (3, 44)), 2 * pixels - 1, 2.0, decode=lambda x: x)
    seen = {}
    judge.model.register_forward_pre_hook(lambda part, _, inputs: seen.update(inputs), with_kwargs=True)
    logits = judge(videos, adapter=judge.adapter)
    # What it did: every token's reward, of which those at the three tokens count.
    hidden = scorer(**seen, output_hidden_states=True).hidden_states[-1]
    rewards = scorer.rm_head(hidden).squeeze(2)
    rewarded = torch.isin(seen["input_ids"], torch.tensor(judge.tokens.rewards))
    assert rewarded.sum(1).tolist() == [3, 3]
    torch.testing.assert_close(logits, (rewards * rewarded).sum(1), rtol=0, atol=5e-6)
    assert logits.abs().min() > 1e-3


def test_a_plain_model_leaves_the_score_and_adapters_to_chance(model):
    judge, state = judge_of(section(model, lora={"rank": 2}))
    absent = dict(judge.named_parameters()).keys() - state.keys()
    assert absent == {name for name in dict(judge.named_parameters()) if ".adapters." in name or name == "score.weight"}


def words_section(model, **fields):
    """A judge that answers as `tests/judges.py` is asked to, for which frames are as they are."""
    template = f"<|im_start|>user\n{{video}}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    sizes = {"min_pixels": 784, "max_pixels": 3136}
    return VlmDiscriminatorConfig.model_validate({"model": str(model), "head": "yes_no", "template": template, **sizes,
                                                  **fields})  # fmt: skip


def shown(frames=8, fps=4.0):
    """Clips as the suite of metrics takes them, and as judges do."""
    clip = np.random.default_rng(2).integers(0, 256, (2, frames, 28, 56, 3), np.uint8)
    pixels = torch.from_numpy(clip).movedim(-1, 2) / 127.5 - 1
    return clip, Videos(make_prompts(torch.zeros(2, 1, 1), (3, 44)), pixels, fps, decode=lambda x: x)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("trained", ["all", "adapters", "nothing"])
def test_a_score_in_words_is_the_log_odds_of_transformers(tmp_path, trained, tied):
    """And of the suite of metrics that asks the same, of the same frames."""
    model = save_tiny_judge(tmp_path, text_sizes={"tie_word_embeddings": tied})
    fields = {"all": {}, "adapters": {"lora": {"rank": RANK}}, "nothing": {"optimizer": None}}[trained]
    judge, state = judge_of(words_section(model, **fields))
    assert "score.weight" in state
    clips, videos = shown()
    logits = judge(videos, adapter=judge.adapter)
    transformers = importlib.import_module("transformers")
    whole = transformers.AutoModelForImageTextToText.from_pretrained(model).eval()
    assert (whole.lm_head.weight is whole.model.language_model.embed_tokens.weight) == tied
    seen = {}
    judge.model.register_forward_pre_hook(lambda part, _, inputs: seen.update(inputs), with_kwargs=True)
    judge(videos[:1], adapter=judge.adapter)  # alone, it is not padded
    said = whole(**seen).logits[0, -1]
    yes, no = (judge.tokens.tokenizer.convert_tokens_to_ids(answer) for answer in ("Yes", "No"))
    torch.testing.assert_close(logits[0], said[yes] - said[no], rtol=0, atol=5e-6)
    suite = RewardModel(model)
    rewards = [suite.score(clip, text, videos.fps) for clip, text in zip(clips, videos.prompts.texts, strict=True)]
    torch.testing.assert_close(logits, torch.tensor(rewards), rtol=0, atol=5e-6)
    assert (logits[0] - logits[1]).abs() > 1e-4


@torch.no_grad()
def test_a_score_in_words_is_of_the_weights_that_are_laid_over(model, tmp_path):
    """Fine-tuned, with a head of words of its own."""
    transformers = importlib.import_module("transformers")
    head = transformers.AutoModelForImageTextToText.from_pretrained(model).lm_head.weight
    save_file({"lm_head.weight": 3 * head}, tmp_path / "tuned.safetensors")
    plain, _ = judge_of(words_section(model))
    tuned, _ = judge_of(words_section(model, weights=tmp_path / "tuned.safetensors"))
    _, videos = shown()
    torch.testing.assert_close(tuned(videos), 3 * plain(videos))


def test_a_score_in_words_that_is_none_is_refused_in_one_line(model, scorer, tmp_path):
    with pytest.raises(ValueError, match=r"^answers \(Yes, Maybe\) must be a token each"):
        judge_of(words_section(model, answers=("Yes", "Maybe")))
    weights = write_videoalign(tmp_path, scorer, in_one_file=True)
    with pytest.raises(ValueError, match=r"head \(yes_no\) must be of a model that answers in words: .* has a score"):
        judge_of(words_section(model, weights=weights))
    save_file({"visual.merger.ln_q.bias": torch.zeros(32)}, tmp_path / "no_score.safetensors")
    with pytest.raises(ValueError, match=r"weights \(.*no_score.safetensors\) must hold a score, for a fixed judge"):
        judge_of(section(model, weights=tmp_path / "no_score.safetensors", optimizer=None))


def test_what_does_not_fit_is_refused_in_one_line(model, scorer, tmp_path):
    weights = write_videoalign(tmp_path / "published", scorer, in_one_file=True)
    kept = {"weights": weights, "weights_adapters": "keep"}
    with pytest.raises(ValueError, match=r"must have adapters of lora\.rank 4 .* theirs are 2"):
        judge_of(section(model, **kept, lora={"rank": 4, "alpha": ALPHA}))
    (weights / "model_config.json").unlink()
    with pytest.raises(ValueError, match="must say the rank and alpha"):
        judge_of(section(model, weights=weights))
    (tmp_path / "empty").mkdir()
    for path, rule in ((tmp_path / "absent", "must exist"), (tmp_path / "empty", "must hold one of model.pth")):
        with pytest.raises(ValueError, match=rule):
            judge_of(section(model, weights=path))
    for state, rule in (
        ({"rm_head.weight": torch.zeros(3, 32)}, "one number a token: rm_head has 3"),
        ({"model.layers.9.mlp.up_proj.weight": torch.zeros(1)}, "must be of this model: model.language_model.layers.9"),
        ({"visual.merger.ln_q.bias": torch.zeros(7)}, r"ln_q\.bias of \(32,\): it is of \(7,\)"),
    ):
        save_file(state, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=rule):
            judge_of(section(model, weights=tmp_path / "other.safetensors"))
