//! One test of a check for each golden model. A macro cannot list a folder, so the names stand here,
//! once. The test `every_golden_model_is_listed` of `goldens.rs` holds them to the folder.
#![allow(unused_macros, reason = "each test file takes what it needs")]

/// Calls a macro with the names of all golden models behind its arguments.
macro_rules! with_families {
    ($called:ident!($($arguments:tt)*)) => {
        $called! { $($arguments)*
            deepseek_v3 deepseek_v3_plain gemma2 gemma3 gemma3_multimodal gemma4 gemma4_k_eq_v gemma4_moe glm4 glm4_moe
            glm4_moe_lite gpt_oss gpt_oss_experts gpt_oss_mxfp4 gpt_oss_mxfp4_experts granite granitemoehybrid
            granitemoehybrid_rope lfm2 lfm2_moe llama llama3 ministral3 mistral muse_glimmer olmo3 phi3 qwen2 qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_moe_experts qwen3_next smollm3 }
    };
}

/// Makes one test of a check for each family, `CHECK::FAMILY`, so that a family that fails does not
/// hide the others. The second form names the families.
macro_rules! of_each_family {
    ($check:ident) => {
        with_families!(of_each_family!($check:));
    };
    ($check:ident: $($family:ident)+) => {
        mod $check {
            $(
                #[test]
                fn $family() {
                    super::$check(stringify!($family));
                }
            )+
        }
    };
}

macro_rules! names_of {
    ($($family:ident)+) => {
        [$(stringify!($family)),+]
    };
}
