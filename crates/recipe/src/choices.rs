//! Keys whose value is one of a few words.

use std::path::PathBuf;

/// One of a few words.
pub(crate) trait Choice: Copy + 'static {
    /// Every word that the recipe takes, in the order of the variants.
    const WORDS: &'static [&'static str];
    /// What other tools write for them.
    const RIVALS: &'static [ValueRival];

    fn word(self) -> &'static str;

    /// The variant of a word, `None` for any other text.
    fn parse(text: &str) -> Option<Self>;
}

/// Another tool's word for a value.
pub(crate) struct ValueRival {
    /// In lower case.
    pub(crate) theirs: &'static str,
    pub(crate) ours: &'static str,
    /// What to write instead, if our word alone does not say it; else "".
    pub(crate) instead: &'static str,
}

// A variant is declared as `Variant = "word" ["their word", "their word" => "what to write"]`, with
// `=> "what to write" ["their word", ...]` behind it for words of which the same is to be said.
macro_rules! choices {
    ($(
        $(#[$about:meta])*
        $name:ident {
            $(
                $(#[$note:meta])*
                $variant:ident = $text:literal
                    $([$($theirs:literal $(=> $instead:literal)?),* $(,)?])?
                    $(=> $said:literal [$($alike:literal),* $(,)?])?
            ),+ $(,)?
        }
    )+) => { $(
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$note])* $variant),+ }

        impl $name {
            /// Every word that the recipe takes, in the order of the variants.
            pub const ALL: &'static [&'static str] = &[$($text),+];

            /// The word in the recipe.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// The variant of a word, `None` for any other text.
            pub fn from_text(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)+ _ => None }
            }
        }

        impl Choice for $name {
            const WORDS: &'static [&'static str] = $name::ALL;
            const RIVALS: &'static [ValueRival] = &[
                $(
                    $($(
                        ValueRival { theirs: $theirs, ours: $text, instead: concat!("" $(, $instead)?) },
                    )*)?
                    $($(ValueRival { theirs: $alike, ours: $text, instead: $said },)*)?
                )+
            ];

            fn word(self) -> &'static str {
                self.as_str()
            }

            fn parse(text: &str) -> Option<Self> {
                Self::from_text(text)
            }
        }
    )+ };
}

choices! {
    DeviceChoice {
        /// A GPU if there is one.
        Auto = "auto",
        Cpu = "cpu",
        Gpu = "gpu" ["cuda", "mps", "metal"],
    }
    /// The number type of the frozen base and of the compute. Adapter and optimizer state are
    /// always f32.
    DtypeChoice {
        Auto = "auto",
        F32 = "f32" ["float32", "fp32"],
        Bf16 = "bf16" ["bfloat16"],
        F16 = "f16" ["float16", "fp16", "half"],
    }
    /// Where the frozen matrices of the layers are.
    ResidencyChoice {
        /// In memory if they fit there, else on the disk.
        Auto = "auto",
        Memory = "memory" ["ram", "resident", "gpu", "vram", "device"],
        /// In their files: each layer is read whenever a pass comes to it.
        Disk = "disk" [
            "offload", "nvme", "ssd", "mmap",
            "cpu" => r#"write "disk": each layer is read from its file whenever a step comes to it; where to compute is `device`"#,
        ] => r#"write "disk": each layer is read from its file whenever a step comes to it"# ["host", "cpu_offload"],
    }
    Quantization {
        /// 4 bits, levels at the quantiles of a normal distribution
        /// (<https://arxiv.org/abs/2305.14314>).
        Nf4 = "nf4" [
            "4bit", "int4", "fp4", "bnb", "bitsandbytes", "q4",
        ] => "a base that is packed already is read as it is: leave `quantization` out" ["gptq", "awq", "fp8"],
        /// 8 bits with one scale for each row, as bitsandbytes keeps them
        /// (<https://arxiv.org/abs/2208.07339>).
        Int8 = "int8" ["8bit", "llm_int8", "q8"],
        /// 4 bits with a scale and a bias for each 64 columns, as mlx-lm keeps them.
        Mlx4 = "mlx4" ["mlx", "affine"],
        /// 8 bits in the same form.
        Mlx8 = "mlx8",
        /// 4-bit floats with a power of two for each 32 columns (OCP's microscaling formats).
        Mxfp4 = "mxfp4" ["mx"],
    }
    Format {
        /// Told from the rows, which must all agree.
        Auto = "auto",
        Messages = "messages" ["chat", "chatml", "openai", "chat_template", "conversation"],
        PromptCompletion = "prompt_completion" ["completions"],
        Text = "text" ["completion"],
        Alpaca = "alpaca",
        Sharegpt = "sharegpt",
        Tokens = "tokens",
    }
    /// What happens to a row of more than `max_seq_len` tokens.
    Overlong { Error = "error", Truncate = "truncate", Drop = "drop" }
    /// Which tokens of a row are in the loss.
    TrainOn {
        /// Those of every assistant turn.
        Assistant = "assistant" ["completion", "answers"],
        /// Those of the last assistant turn.
        Last = "last",
        All = "all" ["inputs"],
    }
    Method {
        Lora = "lora" [
            "qlora" => r#"write "lora", with quantization = "nf4" in [model]"#,
            "dora" => r#"write "lora", with use_dora = true in [lora]"#,
        ],
        Full = "full" ["fft"],
    }
    OptimizerName {
        /// <https://arxiv.org/abs/1711.05101>
        AdamW = "adamw" ["adam", "adamw_torch", "adamw_torch_fused", "adamw_8bit"],
    }
    /// The learning rate after warm-up.
    ScheduleName {
        Constant = "constant" ["none", "constant_with_warmup"],
        Linear = "linear" ["linear_schedule"],
        Cosine = "cosine" ["cosine_decay"],
    }
    /// Which checkpoint the result of a run is.
    ResultChoice {
        /// The one with the lowest evaluation loss.
        Best = "best",
        Last = "last",
    }
    BackendChoice { Auto = "auto", Rdma = "rdma" ["jaccl"], Tcp = "tcp" ["ring", "gloo"] }
    TopologyChoice { Auto = "auto", Ring = "ring", Mesh = "mesh" }
    /// How the layers lie of ranks that hold a model together.
    PlacementChoice {
        /// As the cables are.
        Auto = "auto",
        /// In turn: the last rank hands on to the first one.
        Ring = "ring" => r#"write "ring": layer n on the (n mod stages)th rank"# [
            "in_turn", "round_robin", "looped", "interleaved", "interleaved1f1b", "loopedbfs",
        ],
        /// Next to each other.
        Contiguous = "contiguous" => r#"write "contiguous": layers next to each other"# [
            "blocks", "chain", "gpipe", "1f1b",
        ],
        /// In turn, there and back.
        Wave = "wave" => r#"write "wave": in turn there and back"# ["zigzag", "zig_zag", "snake", "v", "zbv", "hanayo"],
    }
    /// What sums of gradients are on the way between ranks.
    WireChoice {
        F32 = "f32" ["fp32", "float32"],
        /// Each rank's gradients are rounded to bf16 once, and added in f32.
        Bf16 = "bf16" ["bfloat16", "bf16_compress_hook"],
    }
    /// How the rows of a step are shared out among ranks.
    SharesChoice {
        Even = "even",
        /// By the speed that the ranks have shown. It needs virtual ranks, so that no bit depends
        /// on it.
        Measured = "measured",
    }
}

/// Over how many ranks the layers of a model are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StagesChoice {
    /// As few as have room for them.
    Auto,
    /// So many.
    Count(usize),
}

/// Where TensorBoard's event files go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventFolder {
    /// None are written.
    Off,
    /// Into `tensorboard` in the run directory.
    InRun,
    /// Into a folder of this one that is named like the run. TensorBoard takes each folder for a
    /// run.
    Below(PathBuf),
}
