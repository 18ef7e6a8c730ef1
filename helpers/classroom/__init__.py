"""What the lessons share: checks of answers, panels, figures, the room check, stored outputs."""
