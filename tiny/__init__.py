"""What --preset tiny needs: a world of balls with exact physics, its codec, its words."""
