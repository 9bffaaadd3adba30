"""The words that needle keys are made of: ``adjective-noun``, common, lower case, six letters at most."""

__all__ = ["ADJECTIVES", "NOUNS"]

ADJECTIVES = (
    "amber", "blue", "bold", "brave", "brief", "bright", "broad", "calm", "cheap", "clean", "clear", "clever",
    "cold", "cool", "cosy", "crisp", "curly", "damp", "dark", "deep", "dry", "dusty", "eager", "early", "fair",
    "fast", "fine", "firm", "flat", "fresh", "gentle", "giant", "glad", "gold", "grand", "green", "grey", "happy",
    "heavy", "hollow", "humble", "jolly", "kind", "lazy", "light", "little", "lively", "loud", "lucky", "mild",
    "narrow", "neat", "noble", "odd", "orange", "pale", "plain", "proud", "purple", "quick", "quiet", "rapid",
    "rare", "red", "rich", "round", "rusty", "sharp",
)

NOUNS = (
    "anchor", "apple", "arrow", "basket", "beach", "bell", "bird", "boat", "book", "bottle", "bridge", "brush",
    "candle", "castle", "chair", "cherry", "cloud", "coat", "coin", "corn", "crown", "desert", "door", "dragon",
    "drum", "eagle", "engine", "farm", "feather", "field", "fish", "flower", "forest", "garden", "glass", "hammer",
    "harbor", "hat", "hill", "horse", "house", "island", "jacket", "kettle", "ladder", "lake", "lamp", "lemon",
    "lion", "market", "mirror", "moon", "mountain", "needle", "ocean", "orchid", "owl", "paper", "pepper", "piano",
    "pillow", "planet", "pocket", "river", "rocket", "ship", "shoe", "spoon",
)
