"""transformers' `GlmForCausalLM` with random weights, measured step by step for `infer.bench`.

A process of its own, so that nothing of the project imports torch. It reads one JSON object a line
from standard input and answers each with one on standard output:

  {"do": "open", "config": {...}, "dtype": "float32", "device": "cpu"}   -> {"versions": {...}}
  {"do": "prepare", "mode": "eager", "batch": 1, "prompt": 0, "context": 128, "steps": 16}
                                                                 -> {}
  {"do": "measure"}                                  -> {"seconds": of a prompt, or of a step}

`prompt` above 0 asks for the reading of a prompt, else a step at `context` is measured. "eager"
runs with the growing cache that `generate` has; "compiled" with a static cache and `torch.compile`.
"""

import json
import sys
import time

import torch
import transformers
from transformers import DynamicCache, GlmConfig, GlmForCausalLM, StaticCache


class Peer:
    """The model, and what is being measured."""

    def open(self, config, dtype, device):
        """Makes the model of `infer.bench`'s configuration, in place of the one before."""
        self.model = self.run = None
        self.device = torch.device(device)
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, dtype))
        with self.device:
            self.model = GlmForCausalLM(
                GlmConfig(
                    vocab_size=config["vocab_size"],
                    hidden_size=config["hidden_size"],
                    intermediate_size=config["ffn_hidden_size"],
                    num_hidden_layers=config["num_layers"],
                    num_attention_heads=config["num_heads"],
                    num_key_value_heads=config["num_kv_heads"],
                    head_dim=config["head_dim"],
                    max_position_embeddings=config["seq_length"],
                    rope_parameters={
                        "partial_rotary_factor": 0.5,
                        "rope_type": "default",
                        "rope_theta": 10000.0,
                    },
                    attention_bias=True,
                    rms_norm_eps=config["norm_eps"],
                    pad_token_id=0,
                    eos_token_id=2,
                    tie_word_embeddings=False,
                )
            ).eval()
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"versions": versions, "threads": torch.get_num_threads()}

    def prepare(self, mode, batch, prompt, context, steps):
        """Sets up one measurement and does it once, which compiles what has to be compiled."""
        size = prompt or context + steps
        if mode == "compiled":
            torch.compiler.reset()
            forward = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)
            cache = StaticCache(self.model.config, max_cache_len=size)
        else:
            forward, cache = self.model.forward, None
        tokens = torch.randint(3, self.model.config.vocab_size, (batch, max(prompt, 1)))
        tokens = tokens.to(self.device)
        if prompt:
            self.run = lambda: self.read(forward, cache, tokens)
        else:
            self.run = lambda: self.decode(forward, cache, tokens, context, steps)
        for _ in range(3 if mode == "compiled" else 1):  # graphs are recorded by the second run
            self.run()
        return {}

    def measure(self):
        return {"seconds": self.run()}

    def read(self, forward, cache, tokens):
        """Seconds of reading the prompts and choosing their first tokens."""
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        else:
            cache.reset()
        places = torch.arange(tokens.shape[1], device=self.device)
        start = self.now()
        self.next(forward, cache, tokens, places)
        return self.now() - start

    def decode(self, forward, cache, tokens, context, steps):
        """Seconds of a step after `context` tokens, on average over `steps`."""
        cache = self.filled(cache, tokens.shape[0], context)
        places = torch.arange(context, context + steps, device=self.device)
        start = self.now()
        for step in range(steps):
            tokens = self.next(forward, cache, tokens, places[step : step + 1])
        return (self.now() - start) / steps

    def filled(self, cache, batch, context):
        """The cache with `context` tokens in it; of what they are, the speed does not depend."""
        config = self.model.config
        if cache is None:
            cache = DynamicCache(config=config)
        else:
            cache.reset()
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        zeros = torch.zeros(shape, device=self.device)
        for layer in range(config.num_hidden_layers if context else 0):
            cache.update(zeros, zeros, layer, {"cache_position": torch.arange(context)})
        return cache

    def next(self, forward, cache, tokens, places):
        output = forward(
            input_ids=tokens,
            position_ids=places[None].expand(tokens.shape[0], -1),
            cache_position=places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].argmax(-1, keepdim=True).clone()

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main(peer, mode):
    """Answers until standard input ends; everything is done inside of `mode()`."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing but answers may get between them
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with mode():
                answer = getattr(peer, request.pop("do"))(**request)
        except Exception as error:  # out of memory, a shape that this version cannot do
            answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(Peer(), torch.inference_mode)
