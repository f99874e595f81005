"""Word vectors of the toy world."""

import numpy as np
import pytest

from afd_scale.data.text import embed_words
from afd_scale.data.toy_world import VOCABULARY, toy_prompts


def test_a_word_has_one_vector_wherever_it_stands():
    first = embed_words("bright ball", max_words=4, dim=32)
    second = embed_words("a Ball", max_words=4, dim=32)
    np.testing.assert_array_equal(first[1], second[1])
    assert (first[0] != first[1]).any()


def test_shape_type_and_padding():
    embedding = embed_words("a bright ball", max_words=5, dim=30)
    assert embedding.shape == (5, 30)
    assert embedding.dtype == np.float16
    assert (np.abs(embedding[:3]) == 1).all()
    assert (embedding[3:] == 0).all()


def test_vectors_are_the_same_in_every_process_and_version():
    # SHAKE-256 of "ball" begins with the byte 0x63, read from its highest bit.
    assert embed_words("ball", max_words=1, dim=8)[0].tolist() == [-1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0]


def test_attribute_words_are_nearly_orthogonal():
    words = [word for table in VOCABULARY for word in table]
    vectors = embed_words(" ".join(words), max_words=len(words), dim=64).astype(float)
    cosine = vectors @ vectors.T / 64 - np.eye(len(words))
    assert np.abs(cosine).max() < 0.5
    assert np.linalg.matrix_rank(vectors) == len(words)


def test_every_toy_sentence_fits_sixteen_words():
    for prompt in toy_prompts():
        embed_words(prompt.sentence, max_words=16, dim=4)


def test_a_sentence_too_long_is_refused():
    with pytest.raises(ValueError, match=r"max_words \(2\) must be at least 3"):
        embed_words("a bright ball", max_words=2, dim=8)
