"""What text a prompt becomes before anything reads it: the one place where prompts are cleaned."""

import html

import ftfy

CLEANING = {"cleaned": "wan", "ftfy": ftfy.__version__}  # for the record of what a dataset was made of
_PASSES = 8


def clean_prompt(text: str) -> str:
    """A prompt as Wan's own tokenizer code cleans it: broken characters mended, HTML entities resolved, single blanks.

    Full-width letters become plain and curly quotes straight. Wan cleans once; here it is done until nothing changes,
    so that a prompt which was cleaned is never changed again, whoever reads it next. That differs from once only where
    entities stand beside a `<`, which makes ftfy leave them alone.

    Source: wan/modules/tokenizers.py of Wan 2.1, `whitespace_clean(basic_clean(text))`.
    """
    for _ in range(_PASSES):
        before, text = text, " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
        if text == before:
            break
    return text
