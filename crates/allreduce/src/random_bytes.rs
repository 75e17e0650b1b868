//! Random bytes of the system, and the text of a token made of them.

/// Bytes of a nonce, a key or a full tag.
pub(crate) const KEY_BYTES: usize = 32;

/// The text of a new token: 64 hexadecimal digits from the system's generator.
///
/// # Errors
/// If the system gives no random numbers.
pub fn new_token() -> Result<String, getrandom::Error> {
    Ok(hex(&random_bytes()?))
}

/// Bytes from the system's generator.
///
/// # Errors
/// If the system gives no random numbers.
pub(crate) fn random_bytes() -> Result<[u8; KEY_BYTES], getrandom::Error> {
    let mut bytes = [0; KEY_BYTES];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
