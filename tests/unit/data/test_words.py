"""Prompts of the toy worlds by their words: other sentences, and the combinations that are left out."""

from dataclasses import astuple, replace
from itertools import combinations

import pytest

from afd_scale.codecs.identity import IdentityCodec
from afd_scale.data.worlds import WORLDS
from afd_scale.data.worlds.kick import KickPrompt
from afd_scale.data.worlds.words import is_unseen


def test_a_sentence_is_read_by_its_words() -> None:
    wanted = KickPrompt("dim", "leftward", "no", "rubber")
    assert KickPrompt.parse("Over a rubber floor, LEFTWARD goes a dim ball under no gravity") == wanted
    for wrong in ("a dim ball leftward over rubber", "a dim bright ball leftward under no gravity over rubber",
                  "a dim dim ball leftward under no gravity over rubber"):  # fmt: skip
        with pytest.raises(ValueError, match=r"prompt \('.*'\) must be a sentence of the world of kicks, with one of"):
            KickPrompt.parse(wrong)


@pytest.mark.parametrize("name", WORLDS)
def test_a_prompt_holds_words_of_its_world_alone(name: str) -> None:
    prompt = WORLDS[name].prompt.every()[0]
    with pytest.raises(ValueError, match=r"gravity \('heavy'\) must be one of \['gentle', 'no', 'strong'\]"):
        replace(prompt, gravity="heavy")


@pytest.mark.parametrize("name", WORLDS)
def test_paraphrases_have_the_prompts_words_and_others_around_them(name: str) -> None:
    world = WORLDS[name]
    for prompt in world.prompt.every():
        said = [world.paraphrase(prompt, number) for number in range(len(world.paraphrases))]
        assert len({prompt.sentence, *said}) == 1 + len(said)
        for sentence in said:
            assert world.prompt.parse(sentence) == prompt
            assert len(IdentityCodec().embed(sentence)) <= 16
            assert set(sentence.split()) - set(prompt.sentence.split()), "a bag of the same words is the same prompt"


@pytest.mark.parametrize("name", WORLDS)
def test_a_quarter_is_left_out_and_every_word_is_in_both_parts(name: str) -> None:
    world = WORLDS[name]
    seen, unseen = ([astuple(prompt) for prompt in world.part(part)] for part in ("seen", "unseen"))
    assert len(seen) == 3 * len(unseen)
    assert {*seen, *unseen} == {astuple(prompt) for prompt in world.part("all")}
    words = {word for table in world.prompt.vocabulary for word in table}
    assert {word for words in seen for word in words} == {word for words in unseen for word in words} == words
    every_pair = {pair for prompt in world.prompt.every() for pair in combinations(astuple(prompt), 2)}
    assert {pair for words in seen for pair in combinations(words, 2)} == every_pair


def test_what_is_left_out_stays_the_same() -> None:
    assert is_unseen(KickPrompt("dim", "leftward", "no", "clay"))  # 0 0 0 0
    assert is_unseen(KickPrompt("dim", "rightward", "gentle", "rubber"))  # 0 1 1 1
    assert not is_unseen(KickPrompt("dim", "rightward", "no", "clay"))  # the first three are odd
    assert not is_unseen(KickPrompt("dim", "leftward", "no", "rubber"))  # the last two are
