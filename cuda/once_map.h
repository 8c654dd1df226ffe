// Values that are made once for each key, by whoever asks first.
#pragma once

#include <exception>
#include <future>
#include <map>
#include <mutex>
#include <shared_mutex>

namespace tqext::cuda {

// Making a value (a kernel takes seconds to compile) holds up those who ask for the same key, and nobody else. Where it fails,
// all who waited see the exception, and the next one to ask tries again.
template <class Key, class Value>
class OnceMap {
 public:
  // The reference stays valid as long as the map.
  template <class Make>
  const Value& get(const Key& key, const Make& make) {
    {
      std::shared_lock lock(mutex_);
      const auto found = values_.find(key);
      if (found != values_.end()) return wait(found->second, lock);
    }
    std::promise<Value> promise;
    {
      std::unique_lock lock(mutex_);
      const auto [place, is_new] = values_.try_emplace(key);
      if (!is_new) return wait(place->second, lock);
      place->second = promise.get_future().share();
    }
    try {
      promise.set_value(make());
    } catch (...) {
      std::unique_lock lock(mutex_);
      values_.erase(key);
      promise.set_exception(std::current_exception());
      throw;
    }
    std::shared_lock lock(mutex_);
    return values_.find(key)->second.get();
  }

 private:
  // The future is copied: an entry that fails is erased while others wait for it.
  template <class Lock>
  // NOLINTNEXTLINE(performance-unnecessary-value-param)
  static const Value& wait(std::shared_future<Value> future, Lock& lock) {
    lock.unlock();
    return future.get();
  }
  std::shared_mutex mutex_;
  std::map<Key, std::shared_future<Value>> values_;
};

}  // namespace tqext::cuda
