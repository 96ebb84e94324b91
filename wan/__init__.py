"""What Wan2.1 needs: checkpoints in every layout, LoRA files, export, VAE, text encoder, time grids."""
