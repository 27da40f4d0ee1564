"""The schedule "auto" over a layer's life: reasons to measure again, and layers that share what one of them chose."""
