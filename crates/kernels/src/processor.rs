//! The instructions of this machine's processor that products on the CPU use.

use crate::cpu::bf16_product;

/// The instruction sets for numbers that this processor has, of those that make a difference here.
pub fn instruction_sets() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        use std::is_x86_feature_detected as has;
        let sets = [
            ("AVX2", has!("avx2")),
            ("FMA", has!("fma")),
            ("F16C", has!("f16c")),
            ("AVX-512", has!("avx512f") && has!("avx512vl") && has!("avx512bw") && has!("avx512dq")),
            ("AVX512-BF16", has!("avx512bf16")),
        ];
        found.extend(sets.into_iter().filter(|(_, has)| *has).map(|(name, _)| name));
    }
    #[cfg(target_arch = "aarch64")]
    {
        use std::arch::is_aarch64_feature_detected as has;
        let sets = [("NEON", has!("neon")), ("FP16", has!("fp16")), ("BF16", has!("bf16")), ("I8MM", has!("i8mm"))];
        found.extend(sets.into_iter().filter(|(_, has)| *has).map(|(name, _)| name));
    }
    found
}

/// The instruction set of products in f32.
pub fn f32_kernel() -> &'static str {
    let found = instruction_sets();
    let best = ["AVX-512", "AVX2", "NEON"].into_iter().find(|name| found.contains(name));
    best.unwrap_or("the baseline of the processor")
}

/// The instruction set of products in bf16, where they are faster than those in f32: see
/// [`PackedWeight::bf16`](crate::PackedWeight::bf16). `None`: products are f32.
pub fn bf16_kernel() -> Option<&'static str> {
    bf16_product::is_fast().then_some("AVX512-BF16")
}
