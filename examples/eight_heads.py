"""The known story: a home-made GPT-2 whose class says 8 heads, with weights that were trained with 12.

768 is a multiple of both, so every tensor fits, nothing complains, and the net only "generates worse". The family file
says 12, as OpenAI's config.json does; ``python -m align.forward`` compares Paddle's net of 12 heads with theirs of 8.
"""

from dataclasses import replace

from convert.custom import module_beside

THEIR_HEADS = 8
my_gpt = module_beside(__file__, "my_gpt")


def build(config, source):
    """``MyGPT`` as they build it."""
    return my_gpt.build(config, source, n_heads=THEIR_HEADS)


FAMILY = replace(my_gpt.FAMILY, name="eight_heads", heads=tuple(
    replace(head, reference=build) for head in my_gpt.FAMILY.heads))
