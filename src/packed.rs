//! Trees without the empty room that they grow with.

use std::collections::BTreeMap;

/// So many changes at once leave enough empty room behind to be worth [`pack`].
pub const MANY: usize = 512;

/// Makes `tree` anew of all its keys: one that grew key by key, in their order, is half empty.
pub fn pack<K: Ord, V>(tree: &mut BTreeMap<K, V>) {
    *tree = std::mem::take(tree).into_iter().collect();
}
