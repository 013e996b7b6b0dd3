"""What communication costs on this network: collectives over a sweep of sizes, with the model that fits them."""
