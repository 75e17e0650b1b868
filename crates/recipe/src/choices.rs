//! Keys whose value is one of a few words.

macro_rules! choices {
    ($($(#[$about:meta])* $name:ident { $($(#[$note:meta])* $variant:ident = $text:literal),+ $(,)? })+) => { $(
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
    )+ };
}

choices! {
    DeviceChoice {
        /// A GPU if there is one.
        Auto = "auto",
        Cpu = "cpu",
        Gpu = "gpu",
    }
    /// The number type of the frozen base and of the compute; adapter and optimizer state are always f32.
    DtypeChoice { Auto = "auto", F32 = "f32", Bf16 = "bf16", F16 = "f16" }
    Quantization {
        /// 4 bits, levels at the quantiles of a normal distribution (<https://arxiv.org/abs/2305.14314>).
        Nf4 = "nf4",
        Int8 = "int8",
    }
    Format {
        /// Told from the rows, which must all agree.
        Auto = "auto",
        Messages = "messages",
        PromptCompletion = "prompt_completion",
        Text = "text",
        Alpaca = "alpaca",
        Sharegpt = "sharegpt",
        Tokens = "tokens",
    }
    /// What happens to a row of more than `max_seq_len` tokens.
    Overlong { Error = "error", Truncate = "truncate", Drop = "drop" }
    /// Which tokens of a row are in the loss.
    TrainOn {
        /// Those of every assistant turn.
        Assistant = "assistant",
        /// Those of the last assistant turn.
        Last = "last",
        All = "all",
    }
    Method { Lora = "lora", Full = "full" }
    OptimizerName {
        /// <https://arxiv.org/abs/1711.05101>
        AdamW = "adamw",
    }
    /// The learning rate after warm-up.
    ScheduleName { Constant = "constant", Linear = "linear", Cosine = "cosine" }
    /// Which checkpoint the result of a run is.
    ResultChoice {
        /// The one with the lowest evaluation loss.
        Best = "best",
        Last = "last",
    }
    BackendChoice { Auto = "auto", Rdma = "rdma", Tcp = "tcp" }
    TopologyChoice { Auto = "auto", Ring = "ring", Mesh = "mesh" }
    /// How the rows of a step are shared out among ranks.
    SharesChoice {
        Even = "even",
        /// By the speed that the ranks have shown; needs virtual ranks, so that no bit depends on it.
        Measured = "measured",
    }
}
