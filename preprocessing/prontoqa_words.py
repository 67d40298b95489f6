"""The words of ProntoQA's fictional ontologies, as they occur in the official generator's examples."""

NAMES, CONCEPTS = map(
    str.split,
    (
        "Alex Fae Max Polly Rex Sally Sam Stella Wren",
        "brimpus dumpus gorpus grimpus impus jompus lempus lorpus numpus rompus shumpus sterpus tumpus vumpus wumpus "
        "yumpus zumpus",
    ),
)
# properties of one family exclude each other
FAMILIES = [
    family.split()
    for family in (
        *("blue brown orange red", "large small", "liquid luminous metallic wooden", "opaque transparent"),
        *("feisty happy nervous shy", "bright dull", "bitter sour spicy sweet", "earthy floral fruity"),
        *("cold hot temperate", "aggressive amenable angry kind mean", "discordant loud melodic muffled"),
        *("fast moderate slow", "overcast rainy snowy sunny windy"),
    )
]
