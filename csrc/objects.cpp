// Whether dictionaries and lists of Python hold the same objects yet. Nothing of Python is linked or
// included: the one function of its stable ABI that is needed comes along, so that the library
// needs no headers of Python and serves every version. The caller has Python's lock, and keeps alive
// what is compared.
#include <cstdint>

#include "exported.h"

namespace {

using Next = int(void* dictionary, intptr_t* position, void** key, void** value);  // PyDict_Next
using Item = void*(void* list, intptr_t position);  // PyList_GetItem

bool has_entries(void* dictionary, const int64_t* entries, int64_t count, Next* next) {
  intptr_t position = 0;
  void *key = nullptr, *value = nullptr;
  for (const int64_t* entry = entries; entry < entries + 2 * count; entry += 2)
    if (!next(dictionary, &position, &key, &value) || intptr_t(key) != entry[0] ||
        intptr_t(value) != entry[1])
      return false;
  return !next(dictionary, &position, &key, &value);
}

bool has_entry(void* dictionary, int64_t wanted, int64_t expected, Next* next) {
  intptr_t position = 0;
  void *key = nullptr, *value = nullptr;
  while (next(dictionary, &position, &key, &value))
    if (intptr_t(key) == wanted) return intptr_t(value) == expected;
  return false;
}

// Most dictionaries are in no near cache when they are looked at once a training step. That the fifth
// word of a record leads to its entries is a guess, which is only fetched and never followed.
void fetch_record(int64_t dictionary) { __builtin_prefetch(reinterpret_cast<void*>(dictionary)); }

void fetch_entries(int64_t dictionary) {
  constexpr int keys = 4;
  const char* entries = reinterpret_cast<const char* const*>(dictionary)[keys];
  __builtin_prefetch(entries);
  __builtin_prefetch(entries + 64);
}

}  // namespace

// `table`: the number of dictionaries, their addresses, and of each the number of its entries and the
// addresses of their keys and values, in order; then the number of dictionaries of which one entry
// alone is looked at, and of each its address and those of the entry's key and value.
FASTMT_EXPORTED bool fastmt_dictionaries_hold(const int64_t* table, Next* next) {
  constexpr int64_t near = 8, far = 2 * near;
  const int64_t count = table[0], *dictionaries = table + 1, *entries = dictionaries + count;
  for (int64_t i = 0; i < count; ++i) {
    if (i + far < count) fetch_record(dictionaries[i + far]);
    if (i + near < count) fetch_entries(dictionaries[i + near]);
    if (!has_entries(reinterpret_cast<void*>(dictionaries[i]), entries + 1, entries[0], next))
      return false;
    entries += 1 + 2 * entries[0];
  }
  const int64_t *entry = entries + 1, *end = entry + 3 * entries[0];
  for (; entry < end; entry += 3) {
    if (entry + 3 * far < end) fetch_record(entry[3 * far]);
    if (entry + 3 * near < end) fetch_entries(entry[3 * near]);
    if (!has_entry(reinterpret_cast<void*>(entry[0]), entry[1], entry[2], next)) return false;
  }
  return true;
}

// `addresses`: of the objects of a list that has as many.
FASTMT_EXPORTED bool fastmt_list_holds(void* list, const int64_t* addresses, int64_t count,
                                       Item* item) {
  for (int64_t i = 0; i < count; ++i)
    if (intptr_t(item(list, i)) != addresses[i]) return false;
  return true;
}
