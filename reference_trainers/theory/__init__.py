"""The theory of why there is no collapse, as equations and as experiments on them.

=============== ==================================================================================
file            what is in it
=============== ==================================================================================
`equations`     the systems of the paper and what it says of them in closed form, as functions
`theorem1`      balance: W Wᵀ − α_p⁻¹ W_pᵀ W_p decays at the rate 2η
`theorem2`      without the stop-gradient, or the predictor, W decays to 0
`theorem3`      alignment: [F, W_p] decays where λ_min(K) > 0
`simulate`      the full system with all knobs, beside the reduced system and the modes
`fixed_points`  the parabola s = p²/α_p, p± on it, and the border of collapse
`collapse`      where τ² < 4η(1 + σ²) all collapses: phase diagrams
`ema`           the moving average of the target as a curriculum
`directpred`    W_p set from F by Eq. 18 on the same systems
`claim`         what an experiment comes to: findings and panels
`basin`         where modes end, and the border between, by bisection
`matrices`      random starts, and what is measured of a course
`command`       ``directpred dynamics``: table, numbers; `draw` its pictures, `knobs` its options
=============== ==================================================================================
"""
