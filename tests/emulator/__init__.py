"""PTX on the CPU: what a compiled kernel reads, writes and computes, one lane a CUDA thread."""
