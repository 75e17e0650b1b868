//! The form that an answer has to have, as whoever asks for it says.

/// Which tokens may come next, of one answer. It is asked before each token and told of each.
///
/// Engines on several ranks make the same choices, so an implementation has to be a function of what it was
/// told: no clock, no random numbers.
pub trait Form: Send {
    /// The tokens that may come next: token `t` is bit `t % 32` of word `t / 32`. Tokens behind the last word may
    /// not. End tokens are among them once the answer is complete.
    ///
    /// # Errors
    /// A sentence that says why no token can come.
    fn allowed(&mut self) -> Result<&[u32], String>;

    /// A token was chosen, which was allowed.
    ///
    /// # Errors
    /// As [`Form::allowed`].
    fn take(&mut self, token: u32) -> Result<(), String>;
}

/// Whether a token is among these.
pub(crate) fn allows(allowed: &[u32], token: usize) -> bool {
    allowed.get(token / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
}
