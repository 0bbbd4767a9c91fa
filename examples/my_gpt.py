"""The family file of ``my_gpt_net.py``: what this net calls its parts, and what its checkpoint cannot tell.

A checkpoint, ``torch.save(net.state_dict(), "my.pt")``, to Paddle, and Paddle's net against this very one:

    python -m convert --family examples/my_gpt.py --source my.pt --output out/my
    python -m align --run my --family examples/my_gpt.py

OpenAI's weights into this net:

    python -m convert.gpt2 --source gpt2 --output out/gpt2
    python -m convert.back --family examples/my_gpt.py --source out/gpt2 --output from-openai
"""

from convert.custom import fill, home_made_gpt2, module_beside


def build(config, source, **own):
    """This net with the weights of ``source``, called as transformers' nets are.

    Sizes are the checkpoint's. The number of heads is the class's own, never the config's, which is this file's: a
    wrong ``n_head`` below would else be wrong on both sides, and could not be seen.
    """
    import torch
    net = module_beside(__file__, "my_gpt_net")

    class Called(net.MyGPT):
        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = super().forward(input_ids)
            if labels is None:
                return {"logits": logits}
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return {"logits": logits, "loss": loss}

    built = Called(config["vocab_size"], config["n_positions"], config["n_embd"], config["n_layer"], **own)
    return fill(built, source)


FAMILY = home_made_gpt2(
    "my_gpt",
    n_head=12,
    words="tokens", positions="places", embedded="drop",
    block="blocks.{i}", norms=("ln1", "ln2"), qkv=("attn.query", "attn.key", "attn.value"), out="attn.proj",
    up="up", down="down",
    last_norm="ln_out", head="head",
    dropped={"blocks.{i}.attn.mask": "the causal mask, which Paddle's net makes itself"},
    config={"embd_pdrop": 0.1},
    reference=build,
)
