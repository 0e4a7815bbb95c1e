"""Write an untrained Ma²mba of 0.6M parameters, with a tokenizer made from a list of conversations.

    python examples/make_tiny_model.py --train_file demo/data/train.json --output_dir demo/untrained

It has every part of the real model (CLIP, pooling, projector, Mamba-2), small enough to learn toy films on a CPU.
"""

import argparse
import json

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, Mamba2Config, PreTrainedTokenizerFast, set_seed

from transformers_ma2mba import Ma2mbaConfig, Ma2mbaForVideoQA, Ma2mbaProcessor

ROLE_MARKER = r"<\|\w+\|>"


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that may merge across words.

    A question of `texts` is one token; any other text is spelled out.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(ROLE_MARKER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)

    with open(args.train_file) as file:
        turns = [turn["value"] for row in json.load(file) for turn in row["conversations"]]
    prompt = ["<|system|>You are a helpful assistant.", "<|user|>", "<|assistant|>"]
    tokenizer = make_tokenizer(turns + prompt * len(turns))

    image_token_id = len(tokenizer)
    config = Ma2mbaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=32,
            patch_size=16,
            initializer_range=0.1,
        ),
        text_config=Mamba2Config(
            vocab_size=-(-(image_token_id + 2) // 8) * 8,
            hidden_size=96,
            num_hidden_layers=3,
            num_heads=6,
            head_dim=32,
            state_size=32,
            n_groups=1,
            chunk_size=32,
            time_step_min=0.05,
            time_step_max=0.5,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            tie_word_embeddings=True,
        ),
        image_token_id=image_token_id,
        video_token_id=image_token_id + 1,
        unpadded_vocab_size=image_token_id + 2,
        frames_per_vision_pass=512,
    )
    model = Ma2mbaForVideoQA(config)
    with torch.no_grad():
        # With the stock initialisation (A from 1 to the number of heads, small time steps) a head either forgets
        # within tens of tokens or hardly writes. These heads write strongly at first and remember up to thousands of
        # tokens, so that they learn in hundreds of steps instead of thousands.
        for layer in model.model.language_model.layers:
            decay = torch.logspace(-3, -0.7, layer.mixer.num_heads)
            layer.mixer.A_log.copy_(decay.log())
    model.save_pretrained(args.output_dir)
    Ma2mbaProcessor.from_model_config(config, tokenizer).save_pretrained(args.output_dir)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters in {args.output_dir}")


if __name__ == "__main__":
    main()
