"""peft around transformers' `GlmForCausalLM` with random weights, trained for `train.bench`.

A process of its own, with the requests of `peer_transformers`, but "prepare" takes

  {"mode": "eager", "batch": 4, "length": 512, "rank": 8, "checkpointing": false, "steps": 1}

after which "measure" answers with the seconds of a step: forward, backward, clipping, AdamW. That
model has no fused matrix for queries, keys and values; the three have adapters of their own.
"""

import contextlib

import peft
import torch
from peer_transformers import Peer, main


class Trainer(Peer):
    """The model with its adapter, and the steps that it takes."""

    def open(self, config, dtype, device):
        answer = super().open(config, dtype, device)
        answer["versions"]["peft"] = peft.__version__
        return answer

    def prepare(self, mode, batch, length, rank, checkpointing, steps):
        """Sets up steps and takes them once."""
        self.steps = steps
        self.model.config.use_cache = False
        adapter = peft.LoraConfig(
            r=rank, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"]
        )
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.trained = peft.get_peft_model(self.model, adapter).train()
        self.weights = [x for x in self.trained.parameters() if x.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=5e-5, weight_decay=0.0)
        vocabulary = self.model.config.vocab_size
        self.tokens = torch.randint(3, vocabulary, (batch, length), device=self.device)
        self.run = self.take
        self.run()
        return {}

    def take(self):
        """Seconds of a step, on average."""
        start = self.now()
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            self.trained(input_ids=self.tokens, labels=self.tokens).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
        return (self.now() - start) / self.steps


if __name__ == "__main__":
    main(Trainer(), contextlib.nullcontext)
