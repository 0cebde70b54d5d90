"""What a recipe trains, costs and needs, from configs and lengths; loads no weights."""
