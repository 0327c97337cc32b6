"""Mathematics without meaning: reductions that know masks, log space and mapped axes."""
