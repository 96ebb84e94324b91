"""What --preset tiny needs: a ball with exact physics, its codec, its words."""
