yes ::error::forged
