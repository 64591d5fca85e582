"""Keys of other trainers, answered with ours: what someone who brings a YAML from elsewhere reads."""

from __future__ import annotations

from typing import Final

RENAMED: Final[dict[str, str]] = {
    # transformers TrainingArguments, TRL, alignment-handbook
    "model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "ref_model_name_or_path": "model.reference",
    "ref_model": "model.reference",
    "dataset_name": "data.train",
    "output_dir": "storage_path",
    "run_name": "name",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "max_steps": "optim.steps",
    "num_train_epochs": "optim.epochs",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "adam_epsilon": "optim.eps",
    "eval_steps": "evaluate.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "report_to": "track",
    "torch_dtype": "model.dtype",
    "use_peft": "model.lora",
    "max_length": "data.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "chat_template": "data.template",
    "max_completion_length": "rollout.max_new_tokens",
    "num_generations": "rollout.samples",
    "use_vllm": "rollout.engine",
    # OpenRLHF
    "pretrain": "model.name",
    "ref_pretrain": "model.reference",
    "dataset": "data.train",
    "eval_dataset": "data.eval",
    "prompt_data": "data_policy.prompts",
    "save_path": "storage_path",
    "ckpt_path": "storage_path",
    "train_batch_size": "optim.groups_per_step",
    "max_len": "data.max_tokens",
    "prompt_max_len": "data.max_prompt_tokens",
    "generate_max_len": "rollout.max_new_tokens",
    "n_samples_per_prompt": "rollout.samples",
    "max_epochs": "optim.epochs",
    "max_norm": "optim.max_grad_norm",
    "lr_warmup_ratio": "optim.warmup",
    "adam_betas": "optim.betas",
    "l2": "optim.weight_decay",
    "packing_samples": "optim.tokens_per_micro_batch",
    "lora_rank": "model.lora.rank",
    "critic_pretrain": "critic.model",
    "critic_learning_rate": "critic.lr",
    "value_clip": "method.value_clip",
    "eps_clip": "method.clip",
    "init_kl_coef": "method.kl_coef",
    "lambd": "method.lam",
    # TRL's PPO
    "value_model_path": "critic.model",
    "cliprange": "method.clip",
    "cliprange_value": "method.value_clip",
    "num_ppo_epochs": "data_policy.passes",
    # axolotl
    "base_model": "model.name",
    "datasets": "data.train",
    "test_datasets": "data.eval",
    "sequence_len": "data.max_tokens",
    "num_epochs": "optim.epochs",
    "lr_scheduler": "optim.schedule",
    "adapter": "model.lora",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target_modules",
    "evals_per_epoch": "evaluate.every",
    "saves_per_epoch": "checkpoint.every",
    # parameters of methods, written at the top
    "beta": "method.beta",
    "label_smoothing": "method.label_smoothing",
}
"""Their key → the field that holds the same thing."""

_BATCH = (
    "per-device batch × devices × gradient accumulation = optim.groups_per_step; "
    "memory is bounded by optim.tokens_per_micro_batch"
)
_PRECISION = "write model.dtype: bfloat16 | float16 | float32 (parameters and optimizer stay float32)"

EXPLAINED: Final[dict[str, str]] = {
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "train_micro_batch_size": _BATCH,
    "micro_train_batch_size": _BATCH,
    "micro_batch_size": _BATCH,
    "train_batch_size_per_gpu": _BATCH,
    "per_device_eval_batch_size": "evaluation batches are sized by optim.tokens_per_micro_batch",
    "batch_size": "write optim.groups_per_step, the number of prompt groups of one step over all workers",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "tf32": _PRECISION,
    "param_dtype": _PRECISION,
    "loss_type": "the loss is the method: write method: {name: …}",
    "rl": "the loss is the method: write method: {name: …}",
    "use_weighting": "write weighting: {name: wpo}, or method: wpo",
    "vf_coef": "policy and critic have an optimizer each; write critic.lr",
    "simpo_gamma": "write method: {name: simpo, gamma: …}",
    "gamma_beta_ratio": "write method: {name: simpo, gamma: …} with gamma = beta × ratio",
    "cpo_alpha": "write auxiliary: [{name: sft, data: …, weight: …}] (SimPO has none: leave it out)",
    "rpo_alpha": "write auxiliary: [{name: sft, data: …, weight: …}]",
    "desirable_weight": "write method: {name: kto, desirable_weight: …}",
    "undesirable_weight": "write method: {name: kto, undesirable_weight: …}",
    "num_contrastive": "EXO takes as many candidates as the data have: write method: exo_rw and data.format: ranked",
    "precompute_ref_log_probs": "reference log-probabilities are always computed once, ahead of training; remove it",
    "reference_free": "choose a method without reference: simpo, orpo or mpo",
    "dataset_mixer": "write data.train: [{path: name, weight: fraction}, …]",
    "dataset_mixture": "write data.train: [{path: id, split: …, columns: …, weight: …}, …]",
    "dataset_splits": "write data.train: [{path: name, split: …}]",
    "dataset_config": "write data.train: [{path: name, split: …}]",
    "dataset_train_split": "write data.train: [{path: name, split: …}]",
    "dataset_test_split": "write data.eval: [{path: name, split: …}]",
    "test_split_size": "name held-out data in data.eval; nothing is split off silently",
    "val_set_size": "name held-out data in data.eval; nothing is split off silently",
    "prompt_key": "write data.train: [{path: …, columns: {prompt: …}}]",
    "chosen_key": "write data.train: [{path: …, columns: {chosen: …}}]",
    "rejected_key": "write data.train: [{path: …, columns: {rejected: …}}]",
    "truncation_mode": "prompts are cut from the left and responses from the right; see data.truncated",
    "padding_free": "rows are always packed; remove it",
    "sample_packing": "rows are always packed; remove it",
    "packing": "rows are always packed; remove it",
    "adam": "write optim: {lr: …, betas: […], eps: …}",
    "adam_beta1": "write optim.betas: [beta1, beta2]",
    "adam_beta2": "write optim.betas: [beta1, beta2]",
    "optimizer": "the optimizer is AdamW; write optim: {lr: …, betas: […]}",
    "logging_steps": "every step is written to metrics.jsonl; remove it",
    "logging_strategy": "every step is written to metrics.jsonl; remove it",
    "logging_dir": "logs lie under <storage_path>/<name>; remove it",
    "eval_strategy": "write evaluate: {every: …}, counted in steps",
    "evaluation_strategy": "write evaluate: {every: …}, counted in steps",
    "save_strategy": "write checkpoint: {every: …}, counted in steps",
    "do_train": "write rayalign train; remove it",
    "do_eval": "write evaluate: {every: …}; remove it",
    "data_seed": "one seed orders the data and everything else; remove it",
    "remove_unused_columns": "columns that are not needed are never read; remove it",
    "dataloader_num_workers": "the data are prepared by Ray Data; remove it",
    "preprocessing_num_workers": "the data are prepared by Ray Data; remove it",
    "attn_implementation": "attention is chosen by model and device; remove it",
    "flash_attn": "attention is chosen by model and device; remove it",
    "use_flash_attention_2": "attention is chosen by model and device; remove it",
    "push_to_hub": "final/ is in Hugging Face layout; upload it with: hf upload",
    "hub_model_id": "final/ is in Hugging Face layout; upload it with: hf upload",
    "wandb_project": "write track: [wandb] and set WANDB_PROJECT",
    "use_wandb": "write track: [wandb] and log in with: wandb login",
    "resume_from_checkpoint": "a run with the same name continues by itself; remove it",
    "load_checkpoint": "a run with the same name continues by itself; remove it",
    "deepspeed": "write strategy: {name: deepspeed, workers: …}",
    "zero_stage": "write strategy: {name: deepspeed, workers: …}",
    "fsdp": "write strategy: {name: fsdp2, workers: …}",
    "fsdp_config": "write strategy: {name: fsdp2, workers: …}",
    "num_gpus": "write strategy.workers",
    "ddp_timeout": "collective time-outs are always on; remove it",
    "load_in_4bit": "weights are trained in float32, not quantised; remove it",
    "load_in_8bit": "weights are trained in float32, not quantised; remove it",
    "actor_rollout_ref": "write model, optim, rollout and reference as blocks of their own",
    "trainer": "write optim, strategy, checkpoint and track as blocks of their own",
    "algorithm": "write method: {name: …}",
}
"""Their key → a sentence, where no single field holds the same thing."""

METHODS: Final[dict[str, str]] = {
    "sigmoid": "dpo",
    "exo_pair": "exo_pref",
    "exo": "exo_pref (labels) or exo_rw (rewards)",
    "cdpo": "{name: dpo, label_smoothing: …}",
    "robust": "robust_dpo",
    "cpo": "dpo or simpo",
    "rso": "hinge",
    "rm": "reward_model",
    "reward": "reward_model",
    "max_po": "mpo (Maximum Preference Optimization, 2312.16430)",
    "reinforce++": "reinforce_pp",
    "reinforce": "reinforce_pp (whitened over the round) or rloo (leave-one-out)",
    "dr_grpo": "{name: grpo, normalize: dr_grpo}",
    "dapo": "{name: grpo, normalize: dapo, clip_high: 0.28, kl_coef: 0}",
}
"""Values of their ``loss_type``, and other names of methods → ours."""


def advice(key: str, value: object, *, nested: bool) -> str | None:
    """What to write instead of another trainer's ``key: value``; None for a key that none of them has.

    ``nested``: the key stands in a block of ours, where axolotl's ``rl`` would be a slip for ``lr``.
    """
    if key == "rl" and nested:
        return None
    if key in ("loss_type", "rl") and isinstance(value, str):
        ours = METHODS.get(value, value)
        return f"write method: {ours if ours.startswith('{') else f'{{name: {ours}}}'}"
    if key in RENAMED:
        return f"did you mean {RENAMED[key]}?"
    return EXPLAINED.get(key)
