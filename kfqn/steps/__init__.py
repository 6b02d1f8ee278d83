"""How far layers move along which average and direction, and when curvature is learnt."""
