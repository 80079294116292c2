"""Fine-tuning: data, a training loop on Accelerate, checkpoints, LoRA by PEFT."""
