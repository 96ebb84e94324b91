"""What proves the kernels without a GPU: Triton's compiler (aot), its interpreter, repaired, and an emulator of PTX."""
