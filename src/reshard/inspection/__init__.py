"""What a checkpoint holds, whether a recipe fits it, how two checkpoints differ. Writes nothing."""
