"""Fine-tuning: LoRA on experts and projections, and the trainer."""
